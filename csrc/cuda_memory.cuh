// How the CUDA kernels read and write memory: 128 bits at once or single elements, and weights to float32 and back. A GPU and
// a CPU (tests/cuda_on_host.cpp) run the same lines but for addresses and pairs of 16-bit weights.
#pragma once
#include <type_traits>

#include "dtypes.h"

#if defined(__CUDA_ARCH__)
#define ESFAST_UNROLL _Pragma("unroll")
#else
#define ESFAST_UNROLL
#endif

namespace esfast {

struct alignas(16) Vector { uint32_t word[4]; };
struct alignas(16) Quad { float x[4]; };

// Four floats of shared memory.
ESFAST_FN Quad quad_at(const float* p) { return *reinterpret_cast<const Quad*>(p); }

// What a plain cast points to could be any memory: it gives LD and ST instead of LDG and STG.
template <class T>
ESFAST_FN T& at(uint64_t address) {
#if defined(__CUDA_ARCH__)
    return *static_cast<T*>(__cvta_global_to_generic(address));
#else
    return *reinterpret_cast<T*>(address);
#endif
}

// 128 bits at once. The store is assembly as nvcc 13.0 takes an assignment apart and, of float32, stores single words.
ESFAST_FN Vector load_vector(uint64_t address) {
#if defined(__CUDA_ARCH__)
    const uint4 v = at<const uint4>(address);
    return {{v.x, v.y, v.z, v.w}};
#else
    return at<const Vector>(address);
#endif
}

ESFAST_FN void store_vector(uint64_t address, const Vector& v) {
#if defined(__CUDA_ARCH__)
    asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};"
                 :: "l"(address), "r"(v.word[0]), "r"(v.word[1]), "r"(v.word[2]), "r"(v.word[3]) : "memory");
#else
    at<Vector>(address) = v;
#endif
}

// The two weights of a word, and back, rounded to nearest even: as dtypes.h but for the payload of a NaN.
template <class T>
ESFAST_FN void unpack(uint32_t word, float* x) {
#if defined(__CUDA_ARCH__)
    if constexpr (std::is_same_v<T, Float16>) {
        asm("{.reg .f16 a, b; mov.b32 {a, b}, %2; cvt.f32.f16 %0, a; cvt.f32.f16 %1, b;}"
            : "=f"(x[0]), "=f"(x[1]) : "r"(word));
        return;
    }
#endif
    x[0] = T::load(uint16_t(word));
    x[1] = T::load(uint16_t(word >> 16));
}

template <class T>
ESFAST_FN uint32_t pack(float x0, float x1) {
#if defined(__CUDA_ARCH__)
    uint32_t word;
    if constexpr (std::is_same_v<T, Float16>) asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(x1), "f"(x0));
    else asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(x1), "f"(x0));
    return word;
#else
    return T::store(x0) | uint32_t(T::store(x1)) << 16;
#endif
}

// Where element 0 lies, in memory and (SPLIT) in the flat buffer of low halves. Rows of COLS elements, or a single one, lie
// `pitch` bytes apart.
template <class T, int COLS>
struct Place {
    static constexpr int SIZE = sizeof(typename T::storage);

    uint64_t address, low = 0, pitch = 0, low_pitch = 0;

    static ESFAST_FN uint64_t address_of(uint64_t address, uint32_t e) { return address + uint64_t(e) * SIZE; }
    // At a place of a matrix whose rows lie `stride` elements apart.
    ESFAST_FN void start(int64_t matrix, int64_t row, int64_t column, int64_t stride) {
        address = uint64_t(matrix + (row * stride + column) * SIZE);
        pitch = uint64_t(stride * SIZE);
    }
    ESFAST_FN uint64_t of(int e) const { return address + uint64_t(e / COLS) * pitch + uint64_t(uint32_t(e % COLS)) * SIZE; }
    ESFAST_FN uint64_t low_of(int e) const { return low + uint64_t(e / COLS) * low_pitch + uint64_t(e % COLS) * 2; }
};

// G elements from number e, by 128-bit accesses.
template <int G, class T, int COLS>
ESFAST_FN void load_group(float* x, Place<T, COLS> from, int e) {
    if constexpr (std::is_same_v<T, Float32>) {
        ESFAST_UNROLL
        for (int k = 0; k < G; k += 4) {
            const Vector v = load_vector(from.of(e + k));
            ESFAST_UNROLL
            for (int i = 0; i < 4; ++i) x[k + i] = as_float(v.word[i]);
        }
    } else {
        static_assert(G == 8);
        const Vector v = load_vector(from.of(e));
        [[maybe_unused]] Vector low;
        if constexpr (std::is_same_v<T, Split>) low = load_vector(from.low_of(e));
        ESFAST_UNROLL
        for (int i = 0; i < 4; ++i) {
            if constexpr (std::is_same_v<T, Split>) {
                x[2 * i] = T::load(uint16_t(v.word[i]), uint16_t(low.word[i]));
                x[2 * i + 1] = T::load(uint16_t(v.word[i] >> 16), uint16_t(low.word[i] >> 16));
            } else {
                unpack<T>(v.word[i], x + 2 * i);
            }
        }
    }
}

template <class T, int COLS>
ESFAST_FN float load_one(Place<T, COLS> from, int e) {
    if constexpr (std::is_same_v<T, Split>) {
        return T::load(at<const uint16_t>(from.of(e)), at<const uint16_t>(from.low_of(e)));
    } else {
        return T::load(at<const typename T::storage>(from.of(e)));
    }
}

template <int G, bool STOCHASTIC, class T, int COLS>
ESFAST_FN void store_group(Place<T, COLS> to, int e, const float* x, const uint32_t* random) {
    if constexpr (std::is_same_v<T, Float32>) {
        ESFAST_UNROLL
        for (int k = 0; k < G; k += 4)
            store_vector(to.of(e + k), {{as_bits(x[k]), as_bits(x[k + 1]), as_bits(x[k + 2]), as_bits(x[k + 3])}});
    } else {
        Vector v;
        [[maybe_unused]] Vector low;
        ESFAST_UNROLL
        for (int i = 0; i < 4; ++i) {
            const float x0 = x[2 * i], x1 = x[2 * i + 1];
            if constexpr (std::is_same_v<T, Split>) {
                const uint32_t a = T::canonical(x0), b = T::canonical(x1);
                v.word[i] = T::high(a) | uint32_t(T::high(b)) << 16;
                low.word[i] = T::low(a) | uint32_t(T::low(b)) << 16;
            } else if constexpr (STOCHASTIC) {
                v.word[i] = T::store(x0, random[2 * i]) | uint32_t(T::store(x1, random[2 * i + 1])) << 16;
            } else {
                v.word[i] = pack<T>(x0, x1);
            }
        }
        store_vector(to.of(e), v);
        if constexpr (std::is_same_v<T, Split>) store_vector(to.low_of(e), low);
    }
}

template <bool STOCHASTIC, class T, int COLS>
ESFAST_FN void store_one(Place<T, COLS> to, int e, float x, uint32_t random) {
    if constexpr (std::is_same_v<T, Float32>) {
        at<uint32_t>(to.of(e)) = as_bits(x);
    } else if constexpr (std::is_same_v<T, Split>) {
        const uint32_t a = T::canonical(x);
        at<uint16_t>(to.of(e)) = T::high(a);
        at<uint16_t>(to.low_of(e)) = T::low(a);
    } else if constexpr (STOCHASTIC) {
        at<uint16_t>(to.of(e)) = T::store(x, random);
    } else {
        at<uint16_t>(to.of(e)) = uint16_t(pack<T>(x, 0.0f));
    }
}

}  // namespace esfast
