// Which kernel of the Hopper forward runs, and what it is told: maps of the tensors, the order of
// tiles, as many blocks as multiprocessors.
#pragma once

#include "kernels/attention_fwd_sm90.h"
#include "ptx/zero.h"

namespace fused_lm {
namespace attention_fwd {

// Keys and values of the heads in a section: about half of an H100's L2, so that they stay while
// the tiles of the next section come in.
constexpr int64_t kSectionBytes = 24 * 1024 * 1024;

// A map of a [B, H, length, columns] tensor whose boxes are slabs of Tile, `rows` high. A dimension
// of one element has no stride of its own: any that is legal does.
template <class Element, class Tile>
Status map_heads(ptx::TensorMap& map, const uint16_t* base, const HeadStrides& strides, int B,
                 int heads, int length, int columns, int rows) {
  const auto bytes = [&](int size, int64_t stride) {
    return size_of(kDTypeOf<Element>) * (size == 1 ? int64_t{columns} : stride);
  };
  return encode_tensor_map(
      map, {base,
            kDTypeOf<Element>,
            4,
            {columns, length, heads, B},
            {0, bytes(length, strides.row), bytes(heads, strides.head), bytes(B, strides.batch)},
            {Tile::kSlabColumns, rows, 1, 1},
            Tile::kSwizzle});
}

// Sections of heads matter where tiles of one length come one head after the other; elsewhere all
// tiles of a head come together.
inline TileOrder tile_order(const AttentionForwardParams& p, int block_t) {
  const AttentionShape& shape = p.shape;
  const int heads = shape.B * shape.H;
  const int tiles = (shape.T + block_t - 1) / block_t;
  if (p.score.upper >= shape.S - 1) return {tiles, heads, 1, false};
  const int64_t kv_bytes = int64_t{shape.S} * (shape.D + shape.Dv) * int64_t{sizeof(uint16_t)};
  const int64_t held = kSectionBytes / kv_bytes * shape.group;
  const int64_t section = held < shape.group ? shape.group : held;
  return {tiles, heads, static_cast<int>(section < heads ? section : heads), true};
}

template <class Element, int kD, bool kGeneral>
Status launch_hopper(const AttentionForwardParams& p, int multiprocessors, int* tile_counter,
                     Stream stream) {
  using C = HopperConfig<kD, kGeneral>;
  const AttentionShape& shape = p.shape;
  const int kv_heads = shape.H / shape.group;
  ptx::TensorMap q, k, v, out;
  const Status statuses[] = {
      map_heads<Element, typename C::Queries>(q, p.q, p.q_strides, shape.B, shape.H, shape.T,
                                              shape.D, C::kBlockT),
      map_heads<Element, typename C::Keys>(k, p.k, p.k_strides, shape.B, kv_heads, shape.S, shape.D,
                                           C::kBlockS),
      map_heads<Element, typename C::Keys>(v, p.v, p.v_strides, shape.B, kv_heads, shape.S,
                                           shape.Dv, C::kBlockS),
      map_heads<Element, typename C::Queries>(out, p.out, p.out_strides, shape.B, shape.H, shape.T,
                                              shape.Dv, kGroupRows)};
  for (const Status status : statuses) {
    if (status != kOk) return status;
  }
  const TileOrder order = tile_order(p, C::kBlockT);
  const int tiles = order.tiles * order.heads;
  const int blocks = tiles < multiprocessors ? tiles : multiprocessors;
  int* counter = blocks < tiles ? tile_counter : nullptr;
  if (counter != nullptr) {
    const Status status = zero_async(counter, sizeof(*counter), stream);
    if (status != kOk) return status;
  }
  const LaunchConfig config{dim3(static_cast<unsigned>(blocks)), dim3(C::kThreads),
                            sizeof(typename C::SharedStorage), stream};
  return launch(attention_fwd_sm90<Element, kD, kGeneral>, config, q, k, v, out, p, order, counter);
}

// Calls body with the compiled head dim that holds D and Dv, as a constant.
template <int kIndex = 0, class Body>
Status with_hopper_head_dim(const AttentionShape& shape, const Body& body) {
  constexpr int kD = kHopperHeadDims[kIndex];
  if (shape.D <= kD && shape.Dv <= kD) return body(std::integral_constant<int, kD>{});
  if constexpr (kD < kMaxHeadDim) {
    return with_hopper_head_dim<kIndex + 1>(shape, body);
  } else {
    return "an attention has head dims above 256";
  }
}

template <class Element>
Status launch_any_hopper(const AttentionForwardParams& p, int multiprocessors, int* tile_counter,
                         Stream stream) {
  return with_hopper_head_dim(p.shape, [&](auto head_dim) {
    constexpr int kD = decltype(head_dim)::value;
    return is_plain(p.score, p.dropout)
               ? launch_hopper<Element, kD, false>(p, multiprocessors, tile_counter, stream)
               : launch_hopper<Element, kD, true>(p, multiprocessors, tile_counter, stream);
  });
}

}  // namespace attention_fwd
}  // namespace fused_lm
