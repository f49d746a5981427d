// Counter-based dropout masks: Philox4x32 with 7 rounds, the bits of fused_lm/reference/philox.py.
//
//   counter = (column / 8, row + rng[3], head + rng[2] + (batch << 16), rng[1] + (batch >> 16))
//   key     = (low, high) 32 bits of rng[0]
//   column c is dropped where 16-bit lane c % 8 (word (c % 8) / 2, low half first) < threshold
//
// The counter names an element, never a thread or a tile, so a backward draws the same mask again.
// One call is 14 wide products, 28 exclusive ors and 14 key steps, for eight columns.
//
// Source: Salmon, Moraes, Dror, Shaw 2011, "Parallel random numbers: as easy as 1, 2, 3".
#pragma once

#include <cstdint>

#include "ptx/builtins.h"

namespace fused_lm {

constexpr int kPhiloxRounds = 7;
constexpr int kPhiloxLanes = 8;
constexpr int kPhiloxLaneBits = 16;
constexpr uint32_t kPhiloxMultiplier0 = 0xD2511F53u;
constexpr uint32_t kPhiloxMultiplier1 = 0xCD9E8D57u;
constexpr uint32_t kPhiloxKeyStep0 = 0x9E3779B9u;
constexpr uint32_t kPhiloxKeyStep1 = 0xBB67AE85u;

// What every element of one (batch, head) shares.
struct DropoutKey {
  uint32_t key[2];
  uint32_t row_off;
  uint32_t counter[2];
};

struct PhiloxWords {
  uint32_t word[4];
};

// rng: int64 [4] = (seed, offset, head offset, row offset).
__device__ __forceinline__ DropoutKey dropout_key(const int64_t* rng, int64_t batch, int64_t head) {
  const uint64_t seed = static_cast<uint64_t>(rng[0]);
  DropoutKey key;
  key.key[0] = static_cast<uint32_t>(seed);
  key.key[1] = static_cast<uint32_t>(seed >> 32);
  key.row_off = static_cast<uint32_t>(rng[3]);
  key.counter[0] = static_cast<uint32_t>(head + rng[2]) + static_cast<uint32_t>(batch << 16);
  key.counter[1] = static_cast<uint32_t>(rng[1] + (batch >> 16));
  return key;
}

// The eight lanes of columns 8 * column_block .. 8 * column_block + 7.
__device__ __forceinline__ PhiloxWords dropout_words(const DropoutKey& key, int64_t row,
                                                     int64_t column_block) {
  uint32_t c0 = static_cast<uint32_t>(column_block);
  uint32_t c1 = static_cast<uint32_t>(row) + key.row_off;
  uint32_t c2 = key.counter[0];
  uint32_t c3 = key.counter[1];
  uint32_t k0 = key.key[0];
  uint32_t k1 = key.key[1];
#pragma unroll
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const uint64_t first = static_cast<uint64_t>(c0) * kPhiloxMultiplier0;
    const uint64_t second = static_cast<uint64_t>(c2) * kPhiloxMultiplier1;
    c0 = static_cast<uint32_t>(second >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(second);
    c2 = static_cast<uint32_t>(first >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(first);
    k0 += kPhiloxKeyStep0;
    k1 += kPhiloxKeyStep1;
  }
  return PhiloxWords{{c0, c1, c2, c3}};
}

// Factors of kVec columns from first_lane (a multiple of kVec) on: `scale` where kept, 0 elsewhere.
template <int kVec>
__device__ __forceinline__ void keep_factors(float (&factor)[kVec], const PhiloxWords& words,
                                             int first_lane, uint32_t threshold, float scale) {
  // Selects, since an index that is no constant would put the words into local memory.
  const bool high = first_lane >= 4;
  const uint32_t w0 = kVec < 8 && high ? words.word[2] : words.word[0];
  const uint32_t w1 = kVec < 8 && high ? words.word[3] : words.word[1];
  const uint32_t lanes[4] = {kVec == 1 && first_lane % 4 >= 2 ? w1 : w0, w1, words.word[2],
                             words.word[3]};
#pragma unroll
  for (int e = 0; e < kVec; ++e) {
    const int shift = kPhiloxLaneBits * ((kVec == 1 ? first_lane : e) % 2);
    const uint32_t lane = (lanes[e / 2] >> shift) & 0xffffu;
    factor[e] = lane >= threshold ? scale : 0.0f;
  }
}

// Bit i: whether lane i is kept.
__device__ __forceinline__ uint32_t keep_bits(const PhiloxWords& words, uint32_t threshold) {
  uint32_t bits = 0;
#pragma unroll
  for (int i = 0; i < kPhiloxLanes; ++i) {
    const uint32_t lane = words.word[i / 2] >> kPhiloxLaneBits * (i % 2) & 0xffffu;
    bits |= lane >= threshold ? 1u << i : 0u;
  }
  return bits;
}

}  // namespace fused_lm
