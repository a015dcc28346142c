// Prints a hash of what the baseline kernels make of every dtype and kind of noise: for test_arm64.py.
#include <stdio.h>

#include <vector>

#include "cpu.h"

using namespace esfast;

int main() {
    for (int64_t dtype = 0; dtype < 3; ++dtype)
        for (int64_t kind = 0; kind < 2; ++kind)
            for (int64_t members = 0; members < 4; ++members) {
                const int width = dtype == 0 ? 4 : 2;
                std::vector<uint8_t> weights(size_t(70001 * width));
                uint32_t state = 12345;
                for (auto& byte : weights) byte = uint8_t((state = state * 1664525u + 1013904223u) >> 24);
                for (size_t i = size_t(width) - 1; i < weights.size(); i += size_t(width)) weights[i] &= 0xbb;  // finite
                // seven rows of a matrix, across 2^34: the high word of the block number takes part
                const int64_t address = int64_t(weights.data());
                const Segment segment = {address, address, 7, 9999, 10000, 10000, 100003, (int64_t(1) << 34) - 77, 0x9abcdef0, dtype};
                const uint64_t seeds[] = {5, ~uint64_t(0), 77};
                const float coeffs[] = {1e-3f, -0.25f, 3.0f};
                const int64_t first_tile[] = {0, 7 * tiles_per_row(segment)};
                const Job job = {&segment, first_tile, 1, seeds, coeffs, members, kind};
                for (int64_t tile = 0; tile < first_tile[1]; ++tile) tile_baseline(job, tile);
                uint64_t hash = 1469598103934665603u;
                for (auto byte : weights) hash = (hash ^ byte) * 1099511628211u;
                printf("%d %d %d %016llx\n", int(dtype), int(kind), int(members), (unsigned long long)hash);
            }
}
