// Products of a few rows with the matrix of each of several members.
#pragma once
#include <stdint.h>

namespace esfast {

// y[k] = x[k] weights[k] + bias[k] for each member k: (rows, in) times (in, out). All are float32 without gaps; `bias`
// may be null.
struct Products {
    const float *x, *weights, *bias;
    float* y;
    int64_t members, rows, in, out;

    // Those of members begin to end - 1.
    Products of(int64_t begin, int64_t end) const {
        return {x + begin * rows * in, weights + begin * in * out, bias ? bias + begin * out : nullptr,
                y + begin * rows * out, end - begin, rows, in, out};
    }
};

void products_avx512(const Products&);

}  // namespace esfast
