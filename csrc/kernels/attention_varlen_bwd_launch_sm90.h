// The launches of the packed backward.
#pragma once

#include "kernels/attention_bwd_launch_sm90.h"
#include "kernels/attention_varlen_bwd_rows_sm90.h"
#include "kernels/attention_varlen_bwd_sm90.h"

namespace fused_lm {
namespace attention_bwd {

template <class Element, int kD, bool kGeneral>
Status launch_packed(const AttentionVarlenBackwardParams& packed, const HopperBackwardRoom& room,
                     Stream stream) {
  using C = PackedBackwardConfig<kD, kGeneral>;
  const AttentionShape& shape = packed.p.shape;
  PackedBackwardParams told{};
  told.packed = packed;
  told.room = room;
  told.query_tiles = static_cast<int>(varlen_tiles(shape.T, packed.sequences, C::kBlockT));
  Status status = map_tensors<Element, C>(told.maps, packed.p);
  if (status != kOk) return status;
  const PackedRowsParams rows{packed, room};
  const int64_t key_tiles = varlen_tiles(shape.S, packed.sequences, C::kBlockS);
  const auto launch_tiles = [&](auto made, const auto& params, int64_t tiles, int heads,
                                int threads, size_t smem_bytes) {
    return launch_grid(made, params, tiles, heads, 1, threads, smem_bytes, stream);
  };
  status = launch_tiles(attention_varlen_bwd_prepare<Element, kD, kGeneral>, rows, told.query_tiles,
                        shape.H, kRowsThreads, 0);
  if (status != kOk) return status;
  status = launch_tiles(attention_varlen_bwd_sm90<Element, kD, kGeneral>, told, key_tiles,
                        shape.H / shape.group, C::kThreads, sizeof(typename C::SharedStorage));
  if (status != kOk) return status;
  return launch_tiles(attention_varlen_bwd_finish<Element, kD, kGeneral>, rows, told.query_tiles,
                      shape.H, kRowsThreads, sizeof(DqRows<C>));
}

template <class Element>
Status launch_packed_backward(const AttentionVarlenBackwardParams& packed,
                              const HopperBackwardRoom& room, Stream stream) {
  return with_backward_kernel<64, 96, 128, 192, 256>(packed.p, [&](auto dim, auto general) {
    return launch_packed<Element, dim(), general()>(packed, room, stream);
  });
}

}  // namespace attention_bwd
}  // namespace fused_lm
