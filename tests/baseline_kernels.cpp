// Prints a hash of what the baseline kernels make of every format and kind of noise: for test_arm64.py.
#include <stdio.h>

#include <vector>

#include "cpu.h"
#include "dtypes.h"

using namespace esfast;

// In place, `members` members; with each the next of: nothing more, stochastic rounding and decay, Adam.
uint64_t hash_of(int64_t format, int64_t kind, int64_t members) {
    const int width = format == FLOAT32 ? 4 : 2;
    std::vector<uint8_t> weights(size_t(70001 * width));
    std::vector<uint16_t> low(70000);
    std::vector<float> moments(140000, 0.5f);
    uint32_t state = 12345;
    for (auto& byte : weights) byte = uint8_t((state = state * 1664525u + 1013904223u) >> 24);
    for (size_t i = size_t(width) - 1; i < weights.size(); i += size_t(width)) weights[i] &= 0xbb;  // finite
    for (auto& half : low) half = uint16_t((state = state * 1664525u + 1013904223u) >> 16);
    // seven rows of a matrix, across 2^34: the high word of the block number takes part
    const int64_t address = int64_t(weights.data());
    Segment segment = {address, address, 0, 7, 9999, 10000, 10000, 0, 100003, (int64_t(1) << 34) - 77, 0,
                       0x9abcdef0, format, format};
    if (kind == LOW_RANK) {  // with factors whose blocks cross 2^32
        segment.flat_stride = segment.cols;
        segment.a_id = 0x12345678, segment.a_first = 3, segment.a_step = 1000003;
        segment.b_id = 0x9abcdef1, segment.b_first = (int64_t(1) << 34) - 55, segment.b_step = 100003;
    }
    const uint64_t seeds[] = {5, ~uint64_t(0), 77};
    const float coeffs[] = {1e-3f, -0.25f, 3.0f};
    const int64_t first_tile[] = {0, tiles_of(segment)};
    const bool adam = members == 3;
    Job job = {&segment, first_tile, 1, seeds, coeffs, members, kind, members == 2, false,
                     members == 2 ? 0.1f : 0.0f, low.data(), {adam ? moments.data() : nullptr, moments.data() + 70000, 0.1f, 0.01f, 1e-3f, 1e-8f}};
    if (kind == LOW_RANK) job.rank = 16, job.scale = 0.25f;
    for (int64_t tile = 0; tile < first_tile[1]; ++tile) tile_baseline(job, tile);
    uint64_t hash = 1469598103934665603u;
    const auto add = [&](const void* p, size_t size) {
        for (size_t i = 0; i < size; ++i) hash = (hash ^ static_cast<const uint8_t*>(p)[i]) * 1099511628211u;
    };
    add(weights.data(), weights.size());
    add(low.data(), low.size() * 2);
    add(moments.data(), moments.size() * 4);
    return hash;
}

int main() {
    for (int64_t format = 0; format < 4; ++format)
        for (const int64_t kind : {int64_t(GAUSSIAN), int64_t(RADEMACHER), int64_t(LOW_RANK)})
            for (int64_t members = 0; members < 4; ++members)
                printf("%d %d %d %016llx\n", int(format), int(kind), int(members),
                       (unsigned long long)hash_of(format, kind, members));
}
