// The launches of Hopper's attention backward, and the maps of its tensors.
#pragma once

#include <algorithm>

#include "kernels/attention_bwd_rows_sm90.h"
#include "kernels/attention_bwd_sm90.h"

namespace fused_lm {
namespace attention_bwd {

// A map of a [B, heads, length, columns] tensor whose boxes are slabs of Tile, `rows` high. A
// dimension of one element has no stride of its own: any that is legal does. As in
// attention_fwd_launch_sm90.h, which isn't included: a record of the one would hang on the other.
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

template <class Element, class C>
Status map_tensors(HopperBackwardMaps& maps, const AttentionBackwardParams& p) {
  using Queries = typename C::Queries;
  using Keys = typename C::Keys;
  const AttentionShape& shape = p.shape;
  const int heads = shape.H / shape.group;
  const Status statuses[] = {map_heads<Element, Queries>(maps.q, p.q, p.q_strides, shape.B, shape.H,
                                                         shape.T, shape.D, C::kBlockT),
                             map_heads<Element, Queries>(maps.dout, p.dout, p.dout_strides, shape.B,
                                                         shape.H, shape.T, shape.Dv, C::kBlockT),
                             map_heads<Element, Keys>(maps.k, p.k, p.k_strides, shape.B, heads,
                                                      shape.S, shape.D, C::kBlockS),
                             map_heads<Element, Keys>(maps.v, p.v, p.v_strides, shape.B, heads,
                                                      shape.S, shape.Dv, C::kBlockS),
                             map_heads<Element, Keys>(maps.dk, p.dk, p.dk_strides, shape.B, heads,
                                                      shape.S, shape.D, kGroupKeys),
                             map_heads<Element, Keys>(maps.dv, p.dv, p.dv_strides, shape.B, heads,
                                                      shape.S, shape.Dv, kGroupKeys)};
  for (const Status status : statuses) {
    if (status != kOk) return status;
  }
  return kOk;
}

// `kernel` is the main one.
template <class Element, int kD, bool kGeneral, bool kLong = false>
Status launch_hopper(void (*kernel)(HopperBackwardParams, int), const AttentionBackwardParams& p,
                     const HopperBackwardRoom& room, Stream stream) {
  using C = BackwardConfig<kD, kGeneral, kLong>;
  const AttentionShape& shape = p.shape;
  HopperBackwardParams hopper{};
  hopper.p = p;
  hopper.room = room;
  Status status = map_tensors<Element, C>(hopper.maps, p);
  if (status != kOk) return status;
  const RowsParams rows{p, room};
  const int64_t query_tiles = (int64_t{shape.T} + C::kBlockT - 1) / C::kBlockT;
  const int64_t key_tiles = (int64_t{shape.S} + C::kBlockS - 1) / C::kBlockS;
  const auto launch_tiles = [&](auto made, const auto& params, int64_t tiles, int heads,
                                int threads, size_t smem_bytes) {
    return launch_grid(made, params, tiles, heads, shape.B, threads, smem_bytes, stream);
  };
  status = launch_tiles(attention_bwd_prepare<Element, kD, kGeneral, kLong>, rows, query_tiles,
                        shape.H, kRowsThreads, 0);
  if (status != kOk) return status;
  const int64_t at_once = room.slots == 0 ? key_tiles : room.slots;
  hopper.slot_batches = room.slots == 0 ? 0 : shape.B;
  for (int64_t first = 0; first < key_tiles; first += at_once) {
    hopper.first_tile = static_cast<int>(first);
    status = launch_tiles(kernel, hopper, std::min(at_once, key_tiles - first),
                          shape.H / shape.group, C::kThreads, sizeof(typename C::SharedStorage));
    if (status != kOk) return status;
  }
  return launch_tiles(attention_bwd_finish<Element, kD, kGeneral, kLong>, rows, query_tiles,
                      shape.H, kRowsThreads, sizeof(DqRows<C>));
}

// Calls launch<head dim, whether general>(), which are constants, for the head dim of these that
// holds D and Dv.
template <int kHeadDim, int... kLarger, class Launch>
Status with_backward_kernel(const AttentionBackwardParams& p, const Launch& launch) {
  if constexpr (sizeof...(kLarger) > 0) {
    if (hopper_backward_head_dim(p.shape) != kHeadDim) {
      return with_backward_kernel<kLarger...>(p, launch);
    }
  }
  constexpr std::integral_constant<int, kHeadDim> kD;
  return is_plain(p.score, p.dropout) ? launch(kD, std::false_type{})
                                      : launch(kD, std::true_type{});
}

template <class Element>
Status launch_hopper_backward(const AttentionBackwardParams& p, const HopperBackwardRoom& room,
                              Stream stream) {
  return with_backward_kernel<64, 96, 128>(p, [&](auto dim, auto general) {
    constexpr int kD = dim();
    constexpr bool kGeneral = general();
    if constexpr (kD == 128 && !kGeneral) {
      const bool has_band = p.score.lower > -p.shape.T || p.score.upper < p.shape.S;
      if (!has_band && hopper_backward_takes_long(kD, p.shape.T)) {
        return launch_hopper<Element, kD, false, true>(attention_bwd_sm90<Element, kD, false, true>,
                                                       p, room, stream);
      }
    }
    return launch_hopper<Element, kD, kGeneral>(attention_bwd_sm90<Element, kD, kGeneral, false>, p,
                                                room, stream);
  });
}

}  // namespace attention_bwd
}  // namespace fused_lm
