// Where the weights of a thread lie: addresses, numbers in the whole tensor, and what of the tile is there.
#pragma once
#include "cuda_layout.cuh"

namespace esfast {

// All from the thread's first element on: groups then lie at distances that the compiler knows.
template <class Src, class Dst, uint32_t KIND, Rule RULE>
struct Places {
    static constexpr int G = sizeof(typename Src::storage) == 4 && sizeof(typename Dst::storage) == 4 ? 4 : 8;
    using Held = Layout<KIND, RULE, G>;
    using Anchor = std::conditional_t<std::is_same_v<Dst, Split>, BFloat16, Dst>;
    static constexpr int COLS = Held::COLS;

    uint32_t first;   // number of the thread's first element in the tile
    uint64_t number;  // and in its whole tensor
    uint32_t tensor_id;
    bool whole;       // all of the tile is there, and aligned
    bool aligned;     // to 128 bits, as are all its rows
    Place<Src, COLS> src;
    Place<Dst, COLS> dst;
    Place<Anchor, COLS> anchor;
    Place<Float32, COLS> m, v;
};

template <class Src, class Dst, uint32_t KIND, Rule RULE>
struct Tile : Places<Src, Dst, KIND, RULE> {
    static constexpr bool READS_EXTRAS = RULE != ONE || std::is_same_v<Src, Split> || std::is_same_v<Dst, Split>;

    Range span;

    ESFAST_FN Tile(const CudaJob& job, uint32_t tile, uint32_t thread) {
        const uint32_t first = this->first = Tile::Held::first(thread);
        const TileRecord record = at<const TileRecord>(job.tiles + uint64_t(tile) * sizeof(TileRecord));
        TileExtra extra = {0, 0};
        if (READS_EXTRAS && job.extras) extra = at<const TileExtra>(job.extras + uint64_t(tile) * sizeof(TileExtra));
        this->number = uint64_t(record.start) + first;
        this->tensor_id = uint32_t(record.span >> 32);
        span = {int(uint32_t(record.span) & 0x7fff) - int(first), int(uint32_t(record.span) >> 15 & 0xffff) - int(first)};
        this->whole = int32_t(uint32_t(record.span)) < 0;
        this->aligned = ((record.dst | record.src | extra.anchor | uint64_t(extra.flat) * 2) & 15) == 0;
        const uint64_t flat = uint64_t(extra.flat) + first;
        this->src = {this->src.address_of(record.src, first), job.low + flat * 2};
        this->dst = {this->dst.address_of(record.dst, first), job.low + flat * 2};
        this->anchor = {extra.anchor ? this->anchor.address_of(extra.anchor, first) : 0};
        this->m = {job.m + flat * 4};
        this->v = {job.v + flat * 4};
    }

    // Of the block that element e is in. Tiles are aligned: the low word of a block's number can't carry within one.
    ESFAST_FN Words<uint32_t> words(uint64_t seed, int e, int per_block, uint32_t domain) const {
        const uint64_t block = this->number / uint32_t(per_block);
        const uint32_t low = uint32_t(block) + uint32_t(e / per_block);
        return philox(seed, Words<uint32_t>{low, uint32_t(block >> 32), this->tensor_id, domain});
    }

    // Whether four elements of a group draw from one block when they are rounded.
    ESFAST_FN bool rounds_quads() const { return true; }

    // To round the four elements from e on with.
    template <bool QUADS>
    ESFAST_FN Words<uint32_t> rounding_words(uint64_t seed, int e) const {
        return words(seed, e, 4, STOCHASTIC_ROUNDING);
    }
};

// Numbers first + q * step + i of a virtual tensor's gaussian noise: factor q of row or column i of the tile.
struct Factor {
    uint64_t first, step;
    uint32_t id;
};

// A tile of a matrix, or of a vector, which is one row: a row of a column of ones, times a row of noise of its own.
template <class Src, class Dst, Rule RULE>
struct Tile<Src, Dst, LOW_RANK, RULE> : Places<Src, Dst, LOW_RANK, RULE> {
    Rectangle<Tile::COLS> span;
    uint64_t index_stride;
    int rows, cols;  // that are there of the whole tile
    bool is_vector;
    Factor a, b;

    ESFAST_FN Tile(const CudaJob& job, uint32_t tile, uint32_t thread) {
        const uint32_t first = this->first = Tile::Held::first(thread);
        const MatrixTile t = at<const MatrixTile>(job.tiles + uint64_t(tile) * sizeof(MatrixTile));
        const Segment& s = at<const Segment>(job.segments + uint64_t(t.segment) * sizeof(Segment));
        const uint32_t bits = uint32_t(t.span);
        this->whole = bits >> 31, this->aligned = bits >> 30 & 1, is_vector = bits >> 29 & 1;
        rows = int(bits >> 8 & 0xff), cols = int(bits & 0xff);
        span = {rows - int(first / Tile::COLS), cols - int(first % Tile::COLS)};
        const int64_t row = t.row + int(first / Tile::COLS), column = t.column + int(first % Tile::COLS);
        index_stride = uint64_t(s.index_stride);
        this->number = uint64_t(s.first + row * s.index_stride + column);
        this->tensor_id = uint32_t(s.tensor_id);
        const uint64_t flat = uint64_t(s.flat + row * s.flat_stride + column), pitch = uint64_t(s.flat_stride);
        this->src.start(s.src, row, column, s.src_stride);
        this->dst.start(s.dst, row, column, s.dst_stride);
        this->src.low = this->dst.low = job.low + flat * 2;
        this->src.low_pitch = this->dst.low_pitch = pitch * 2;
        if (s.anchor) this->anchor.start(s.anchor, row, column, s.anchor_stride);
        else this->anchor = {0};
        this->m = {job.m + flat * 4, 0, pitch * 4};
        this->v = {job.v + flat * 4, 0, pitch * 4};
        a = {uint64_t(s.a_first + t.row), uint64_t(s.a_step), uint32_t(s.a_id)};
        b = {uint64_t(s.b_first + t.column), uint64_t(s.b_step), uint32_t(s.b_id)};
        if (is_vector) b = {uint64_t(s.first + t.row * s.index_stride + t.column), 0, this->tensor_id};
    }

    ESFAST_FN bool rounds_quads() const { return this->whole; }

    template <bool QUADS>
    ESFAST_FN Words<uint32_t> rounding_words(uint64_t seed, int e) const {
        const uint64_t n = this->number + uint64_t(e / Tile::COLS) * index_stride + uint64_t(e % Tile::COLS);
        const Words<uint32_t> w = philox(seed, n / 4, this->tensor_id, STOCHASTIC_ROUNDING);
        if constexpr (QUADS) return w;
        const Words<uint32_t> v = philox(seed, n / 4 + 1, this->tensor_id, STOCHASTIC_ROUNDING);
        const bool one = n & 1, two = n & 2;
        const Words<uint32_t> x = {one ? w.x1 : w.x0, one ? w.x2 : w.x1, one ? w.x3 : w.x2, one ? v.x0 : w.x3};
        const uint32_t x4 = one ? v.x1 : v.x0, x5 = one ? v.x2 : v.x1;
        return {two ? x.x2 : x.x0, two ? x.x3 : x.x1, two ? x4 : x.x2, two ? x5 : x.x3};
    }
};

}  // namespace esfast
