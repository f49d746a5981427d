// Which rows and which keys a block of the decoding kernel works on, and how they come to shared
// memory.
#pragma once

#include "kernels/attention_decode.h"
#include "kernels/attention_decode_tuning.h"
#include "kernels/attention_tile.h"

namespace fused_lm {
namespace attention_decode {

// The rows of a key head: every query of every head that shares it.
__host__ __device__ __forceinline__ int rows_per_head(const AttentionShape& shape) {
  return shape.group * shape.T;
}

// What a block works on: 16 rows from `row` on, of a key head, and a part of their keys.
struct Place {
  int row;
  int split;
  int kv_head;
  int batch;
};

// Splits of the same rows run side by side.
__device__ __forceinline__ Place place_of_block(const AttentionDecodeParams& p, int batch_first) {
  const auto splits = static_cast<unsigned>(p.splits);
  return {static_cast<int>(blockIdx.x / splits) * kDecodeRows,
          static_cast<int>(blockIdx.x % splits), static_cast<int>(blockIdx.y),
          static_cast<int>(blockIdx.z) + batch_first};
}

// Of tensors [.., B, H, T]: where a row of a key head lies.
struct QueryIndex {
  int head, t;
};

__device__ __forceinline__ QueryIndex query_of_row(const AttentionShape& shape, int kv_head,
                                                   int row) {
  return {kv_head * shape.group + row % shape.group, row / shape.group};
}

// Keys begin .. end - 1; none where they are not ordered so.
struct KeyRange {
  int begin, end;
};

__device__ __forceinline__ int64_t integer_at(const Integers& integers, int64_t index) {
  return integers.wide ? static_cast<const int64_t*>(integers.data)[index]
                       : static_cast<const int32_t*>(integers.data)[index];
}

// n: the keys of a sequence, as many as its cache has room for at most.
__device__ __forceinline__ int length_of(const AttentionDecodeParams& p, int batch) {
  const int64_t given = integer_at(p.lens, batch);
  return static_cast<int>(min(max(given, int64_t{0}), int64_t{p.shape.S}));
}

// What queries first .. last of a sequence of n keys see.
__device__ __forceinline__ KeyRange keys_between(const AttentionDecodeParams& p, int length,
                                                 int first, int last) {
  const int64_t place = int64_t{length} - p.shape.T;
  const int64_t begin = max(place + first + p.lower, int64_t{0});
  const int64_t end = min(place + last + p.upper + 1, int64_t{length});
  return {static_cast<int>(min(begin, int64_t{length})), static_cast<int>(max(end, int64_t{0}))};
}

__device__ __forceinline__ KeyRange keys_of_row(const AttentionDecodeParams& p, const Place& place,
                                                int length, int row) {
  const int t = (place.row + row) / p.shape.group;
  return keys_between(p, length, t, t);
}

// What any row of a block sees.
__device__ __forceinline__ KeyRange keys_of_block(const AttentionDecodeParams& p,
                                                  const Place& place, int length) {
  const int last = min(place.row + kDecodeRows, rows_per_head(p.shape)) - 1;
  return keys_between(p, length, place.row / p.shape.group, last / p.shape.group);
}

// The tiles of a split; the first one begins at key `first`.
struct SplitTiles {
  int first, count;
};

// Equal parts, of a tile for every warp at least: what is shorter than all splits has empty ones.
template <class C>
__device__ __forceinline__ SplitTiles tiles_of_split(const KeyRange& keys, int split, int splits) {
  const int begin = keys.begin / C::kBlockS;
  const int tiles = max((keys.end + C::kBlockS - 1) / C::kBlockS - begin, 0);
  const int each = max((tiles + splits - 1) / splits, C::kWarps);
  const int first = min(each * split, tiles);
  const int count = keys.begin < keys.end ? min(each, tiles - first) : 0;
  return {(begin + first) * C::kBlockS, count};
}

// Where a key lies: in which sequence or block, and in which row of it.
struct KeyPlace {
  int64_t block;
  int row;
};

// Whether there is such a block; a table that is wrong must not lead out of the cache.
__device__ __forceinline__ bool find_key(KeyPlace& found, const AttentionDecodeParams& p, int batch,
                                         int s) {
  if (p.table.data == nullptr) {
    found = {batch, s};
    return true;
  }
  const int row_of_table = p.shape.S / p.block_size;
  const int index = s / p.block_size;
  const int64_t block = integer_at(p.table, int64_t{batch} * row_of_table + index);
  found = {block, s - index * p.block_size};
  return block >= 0 && block < p.blocks;
}

// A warp copies the keys from s_first on into two tiles, asynchronously; zeros for those outside of
// `keys`, and beside the columns.
template <class Tile>
__device__ __forceinline__ void copy_keys_async(Tile& sK, Tile& sV, const AttentionDecodeParams& p,
                                                const Place& place, int s_first,
                                                const KeyRange& keys) {
  using Chunks = ChunksOf<Tile, kWarpSize>;
  const Chunks own(static_cast<unsigned>(own_lane()));
#pragma unroll
  for (int row = own.row; row < Tile::kRows; row += Chunks::kRowsAtOnce) {
    const int s = s_first + row;
    KeyPlace found{0, 0};
    const bool inside = s >= keys.begin && s < keys.end && find_key(found, p, place.batch, s);
    if (!inside) found = {0, 0};
    const uint16_t* gK = p.k + found.block * p.k_strides.batch + place.kv_head * p.k_strides.head +
                         found.row * p.k_strides.row;
    const uint16_t* gV = p.v + found.block * p.v_strides.batch + place.kv_head * p.v_strides.head +
                         found.row * p.v_strides.row;
#pragma unroll
    for (int chunk = own.chunk; chunk < Tile::kChunks; chunk += Chunks::kLanes) {
      const int column = chunk * kChunkElements;
      ptx::cp_async_16(sK.at(row, chunk), gK + column,
                       inside && column < p.shape.D ? kChunkBytes : 0);
      ptx::cp_async_16(sV.at(row, chunk), gV + column,
                       inside && column < p.shape.Dv ? kChunkBytes : 0);
    }
  }
}

// The block copies its rows of q; zeros behind the last one.
template <int kThreads, class Tile>
__device__ __forceinline__ void copy_queries_async(Tile& sQ, const AttentionDecodeParams& p,
                                                   const Place& place) {
  const int rows = rows_per_head(p.shape);
  for (int i = static_cast<int>(threadIdx.x); i < Tile::kRows * Tile::kChunks; i += kThreads) {
    const int row = i / Tile::kChunks, chunk = i % Tile::kChunks;
    const bool inside = place.row + row < rows && chunk * kChunkElements < p.shape.D;
    const QueryIndex query = query_of_row(p.shape, place.kv_head, inside ? place.row + row : 0);
    const uint16_t* gRow = p.q + head_offset(p.q_strides, place.batch, query.head) +
                           query.t * p.q_strides.row + chunk * kChunkElements;
    ptx::cp_async_16(sQ.at(row, chunk), gRow, inside ? kChunkBytes : 0);
  }
}

}  // namespace attention_decode
}  // namespace fused_lm
