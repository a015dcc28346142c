// The products of products.h, for processors with AVX-512.
//
// A BLAS routine takes the members' products one by one, and waits for each one's weights: since the step before they
// have left the second-level cache. Here a member's weights are on their way while the member before is calculated. Of
// 30 members with 16 rows, matrices of 64 x 64 take 35 us instead of 51, and those of 64 x 192 take 93 instead of 106. A
// sum is what it is in a BLAS routine for sums as short as these: one fma after another, and then the bias.
#include "products.h"

#include "noise.h"

// Compiled once per instruction set, as cpu_kernel.cpp is. With CFLAGS=-march=native each of them may be AVX-512, and so
// needs a name of its own.
#define ESFAST_JOIN_(a, b) a##b
#define ESFAST_JOIN(a, b) ESFAST_JOIN_(a, b)

#if defined(__AVX512F__)
#include <immintrin.h>

namespace esfast {
namespace {

// Rows and columns whose sums are in registers at once. Less than 12 rows take longer.
constexpr int HEIGHT = 12, WIDTH = 32;

// HIGH rows from `row` on, and the columns from `column` on, of a member. The last columns may be fewer than WIDTH.
template <int HIGH, bool WHOLE>
ESFAST_FN void block(const Products& p, int64_t member, int64_t row, int64_t column) {
    const float* const x = p.x + (member * p.rows + row) * p.in;
    const float* w = p.weights + member * p.in * p.out + column;
    const bool fetches = row == 0;
    const uint32_t there = WHOLE ? ~0u : (1u << (p.out - column)) - 1;  // a bit for each column
    const __mmask16 masks[2] = {__mmask16(there), __mmask16(there >> 16)};
    const auto load = [&](const float* from, int half) {
        return WHOLE ? _mm512_loadu_ps(from + 16 * half) : _mm512_maskz_loadu_ps(masks[half], from + 16 * half);
    };
    __m512 sum[HIGH][2];
#pragma GCC unroll 16
    for (int i = 0; i < HIGH; ++i) sum[i][0] = sum[i][1] = _mm512_setzero_ps();
    for (int64_t k = 0; k < p.in; ++k, w += p.out) {
        const __m512 left = load(w, 0), right = load(w, 1);
        if (fetches) {  // of the next member; behind the last one it does no harm
            const uintptr_t next = reinterpret_cast<uintptr_t>(w) + uintptr_t(p.in * p.out) * sizeof(float);
            __builtin_prefetch(reinterpret_cast<const void*>(next), 0, 2);
            __builtin_prefetch(reinterpret_cast<const void*>(next + 64), 0, 2);
        }
#pragma GCC unroll 16
        for (int i = 0; i < HIGH; ++i) {
            const __m512 factor = _mm512_set1_ps(x[i * p.in + k]);
            sum[i][0] = _mm512_fmadd_ps(factor, left, sum[i][0]);
            sum[i][1] = _mm512_fmadd_ps(factor, right, sum[i][1]);
        }
    }
    float* const y = p.y + (member * p.rows + row) * p.out + column;
    const float* const bias = p.bias ? p.bias + member * p.out + column : nullptr;
#pragma GCC unroll 16
    for (int i = 0; i < HIGH; ++i) {
#pragma GCC unroll 2
        for (int half = 0; half < 2; ++half) {
            if (bias) sum[i][half] = _mm512_add_ps(sum[i][half], load(bias, half));
            float* const to = y + i * p.out + 16 * half;
            if (WHOLE) _mm512_storeu_ps(to, sum[i][half]);
            else _mm512_mask_storeu_ps(to, masks[half], sum[i][half]);
        }
    }
}

template <bool WHOLE>
void columns_from(const Products& p, int64_t member, int64_t column) {
    int64_t row = 0;
    for (; row + HEIGHT <= p.rows; row += HEIGHT) block<HEIGHT, WHOLE>(p, member, row, column);
    for (; row + 4 <= p.rows; row += 4) block<4, WHOLE>(p, member, row, column);
    for (; row < p.rows; ++row) block<1, WHOLE>(p, member, row, column);
}

}  // namespace

void ESFAST_JOIN(products_, ESFAST_ISA)(const Products& p) {
    for (int64_t member = 0; member < p.members; ++member) {
        int64_t column = 0;
        for (; column + WIDTH <= p.out; column += WIDTH) columns_from<true>(p, member, column);
        if (column < p.out) columns_from<false>(p, member, column);
    }
}

}  // namespace esfast
#endif
