// Gradients that repeat bitwise, by Hopper's attention backward: how many tiles of keys a launch
// takes, which is how many slots of sums dq has (attention_bwd_sm90.h). A model of the time, by
// arithmetic for an H200; no GPU has run it yet.
//
// A launch of n tiles is n blocks for every batch and key-value head, in waves of as many blocks as
// there are multiprocessors. Many tiles per launch fill the last wave, and begin seldom; but every
// slot is written as zeros and read again. So the least n that fills a wave is mostly the best: 4
// for 32 heads on 132 multiprocessors, 16 launches for 8192 keys, 17.3 times the time of a block
// instead of 16.3 in any order.
//
// The two passes of the other kernels need no room. They make 7 products where this one makes 5, by
// mma.sync, which on Hopper has 62 % of the rate of wgmma: 2.26 times the time. They take over
// where the room for slots is so short that most multiprocessors would stand idle.
#pragma once

#include <cstdint>

#include "common/types.h"

namespace fused_lm {

// What the backward of an attention is to a GPU.
struct HopperBackwardWork {
  int64_t key_tiles;   // of a head
  int64_t blocks;      // for each tile of keys: batches times key-value heads
  int64_t walk;        // tiles of queries that a block has at most
  int64_t slot_bytes;  // of one set of sums of dq
  int tile_clocks;     // for a tile of queries in a block
};

constexpr double kLaunchClocks = 7000;                // 4 us: of a launch, and of a block's ends
constexpr double kBytesPerClock = 2700;               // of the GPU's memory
constexpr double kTwoPasses = 2.26;                   // against blocks of any order
constexpr int64_t kMostSlotBytes = int64_t{2} << 30;  // beside the first

// Clocks of launches of n tiles of keys, if sums has n slots.
constexpr double hopper_backward_clocks(const HopperBackwardWork& work, int64_t n, int64_t slots,
                                        int multiprocessors) {
  const auto waves = [&](int64_t tiles) {
    return (tiles * work.blocks + multiprocessors - 1) / multiprocessors;
  };
  const int64_t whole = work.key_tiles / n, rest = work.key_tiles % n;
  const int64_t launches = whole + (rest > 0 ? 1 : 0);
  const double blocks = static_cast<double>(whole * waves(n) + waves(rest));
  const double moved = 2.0 * static_cast<double>(slots * work.slot_bytes);
  return blocks * static_cast<double>(work.walk * work.tile_clocks) +
         static_cast<double>(launches) * kLaunchClocks + moved / kBytesPerClock;
}

constexpr double hopper_backward_clocks_in_any_order(const HopperBackwardWork& work,
                                                     int multiprocessors) {
  return hopper_backward_clocks(work, work.key_tiles, 1, multiprocessors);
}

// The slots that cost least, or 0: the two passes cost less.
constexpr int hopper_backward_slots(const HopperBackwardWork& work, int multiprocessors) {
  int64_t most = 1 + kMostSlotBytes / work.slot_bytes;
  if (most > work.key_tiles) most = work.key_tiles;
  int best = 0;
  double least = kTwoPasses * hopper_backward_clocks_in_any_order(work, multiprocessors);
  for (int64_t n = 1; n <= most; ++n) {
    const double clocks = hopper_backward_clocks(work, n, n, multiprocessors);
    if (clocks < least) best = static_cast<int>(n), least = clocks;
  }
  return best;
}

}  // namespace fused_lm
