// Vectors of 2 to 16 bytes between global memory and fp32 registers.
//
// Loads and conversions are apart, so that a kernel can issue all its loads before the first use.
// Bits move through integer types only. A dtype is a value: where it is a constant, branches on it
// vanish; where it is an argument, they are uniform over the grid.
#pragma once

#include <cstring>

#include "common/types.h"
#include "ptx/builtins.h"
#include "ptx/memory.h"

namespace fused_lm {

template <DType kDType>
struct DTypeConstant {
  static constexpr DType value = kDType;
  static constexpr int bytes = size_of(kDType);
};

// Calls body(DTypeConstant<dtype>{}).
template <class Body>
__device__ __forceinline__ void with_dtype(DType dtype, const Body& body) {
  if (dtype == DType::kFloat32) {
    body(DTypeConstant<DType::kFloat32>{});
  } else if (dtype == DType::kFloat16) {
    body(DTypeConstant<DType::kFloat16>{});
  } else {
    body(DTypeConstant<DType::kBFloat16>{});
  }
}

// kVec elements as they lie in memory: one word each, or two to a word. kVec 8 is for 16-bit types.
template <int kVec>
struct RawVector {
  static_assert(kVec == 1 || kVec == 4 || kVec == 8, "scalars, 8-byte or 16-byte vectors");
  uint32_t word[kVec == 1 ? 1 : 4];
};

enum class LoadPolicy {
  kStreaming,  // read once, written by nobody during this kernel
  kCached,     // read again, or written by this kernel
};

// The address of element `index` of an array whose elements have kBytes.
template <int kBytes>
__device__ __forceinline__ const char* address_of(const void* base, int64_t index) {
  return static_cast<const char*>(base) + index * kBytes;
}

template <int kBytes>
__device__ __forceinline__ char* address_of(void* base, int64_t index) {
  return static_cast<char*>(base) + index * kBytes;
}

// Loads kVec elements of kBytes each from an address that is aligned to all of them.
template <int kBytes, LoadPolicy kPolicy, int kVec>
__device__ __forceinline__ void load_raw(RawVector<kVec>& raw, const char* p) {
  if constexpr (kVec * kBytes == 16) {
    uint4 v;
    if constexpr (kPolicy == LoadPolicy::kStreaming) {
      v = ptx::load_streaming(reinterpret_cast<const uint4*>(p));
    } else {
      v = *reinterpret_cast<const uint4*>(p);
    }
    raw.word[0] = v.x, raw.word[1] = v.y, raw.word[2] = v.z, raw.word[3] = v.w;
  } else if constexpr (kVec * kBytes == 8) {
    uint2 v;
    if constexpr (kPolicy == LoadPolicy::kStreaming) {
      v = ptx::load_streaming(reinterpret_cast<const uint2*>(p));
    } else {
      v = *reinterpret_cast<const uint2*>(p);
    }
    raw.word[0] = v.x, raw.word[1] = v.y;
  } else if constexpr (kBytes == 4) {
    static_assert(kVec == 1, "eight fp32 are two vectors");
    raw.word[0] = *reinterpret_cast<const uint32_t*>(p);
  } else {
    raw.word[0] = *reinterpret_cast<const uint16_t*>(p);
  }
}

// Stores what load_raw loads. Results are what the next kernel reads: they may stay in the caches.
template <int kBytes, int kVec>
__device__ __forceinline__ void store_raw(char* p, const RawVector<kVec>& raw) {
  if constexpr (kVec * kBytes == 16) {
    uint4 v;
    v.x = raw.word[0], v.y = raw.word[1], v.z = raw.word[2], v.w = raw.word[3];
    *reinterpret_cast<uint4*>(p) = v;
  } else if constexpr (kVec * kBytes == 8) {
    uint2 v;
    v.x = raw.word[0], v.y = raw.word[1];
    *reinterpret_cast<uint2*>(p) = v;
  } else if constexpr (kBytes == 4) {
    static_assert(kVec == 1, "eight fp32 are two vectors");
    *reinterpret_cast<uint32_t*>(p) = raw.word[0];
  } else {
    *reinterpret_cast<uint16_t*>(p) = static_cast<uint16_t>(raw.word[0]);
  }
}

// Exact for every dtype.
template <DType kDType, int kVec>
__device__ __forceinline__ void widen(float (&value)[kVec], const RawVector<kVec>& raw) {
#pragma unroll
  for (int e = 0; e < kVec; ++e) {
    if constexpr (kDType == DType::kFloat32) {
      if constexpr (kVec <= 4) value[e] = __uint_as_float(raw.word[e]);
    } else if constexpr (kDType == DType::kBFloat16) {
      const uint32_t word = raw.word[e / 2];
      value[e] = __uint_as_float(e % 2 == 0 ? word << 16 : word & 0xffff0000u);
    } else {
      const uint32_t word = raw.word[e / 2];
      value[e] = __half2float(__ushort_as_half(static_cast<uint16_t>(word >> 16 * (e % 2))));
    }
  }
}

// The two values of a word, of which the first one in memory is the low half.
template <DType kDType>
__device__ __forceinline__ void widen_pair(float (&value)[2], uint32_t word) {
  RawVector<4> raw{{word, 0, 0, 0}};
  float four[4];
  widen<kDType>(four, raw);
  value[0] = four[0], value[1] = four[1];
}

// The bits of two fp32, rounded to the nearest 16-bit values, ties to even; `low` first in memory.
template <DType kDType>
__device__ __forceinline__ uint32_t narrow_pair(float low, float high) {
  uint32_t word;
  if constexpr (kDType == DType::kBFloat16) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    memcpy(&word, &pair, sizeof(word));
  } else {
    const __half2 pair = __floats2half2_rn(low, high);
    memcpy(&word, &pair, sizeof(word));
  }
  return word;
}

template <DType kDType, int kVec>
__device__ __forceinline__ void narrow(RawVector<kVec>& raw, const float (&value)[kVec]) {
  if constexpr (kDType == DType::kFloat32) {
#pragma unroll
    for (int e = 0; e < kVec && e < 4; ++e) raw.word[e] = __float_as_uint(value[e]);
  } else if constexpr (kVec == 1) {
    raw.word[0] = narrow_pair<kDType>(value[0], 0.0f);
  } else {
#pragma unroll
    for (int e = 0; e < kVec; e += 2) {
      raw.word[e / 2] = narrow_pair<kDType>(value[e], value[e + 1]);
    }
  }
}

// kVec elements of any dtype as they lie in memory, in one or two loads that the L1 may serve
// again: weights, biases, and rows that are read more than once.
template <int kVec>
struct RawParameter {
  uint32_t word[kVec];
};

template <int kVec>
__device__ __forceinline__ void load_parameter(RawParameter<kVec>& raw, const void* base,
                                               DType dtype, int64_t index) {
  constexpr int kPiece = kVec == 1 ? 1 : 4;
  if (dtype == DType::kFloat32) {
#pragma unroll
    for (int first = 0; first < kVec; first += kPiece) {
      RawVector<kPiece> piece;
      load_raw<4, LoadPolicy::kCached>(piece, address_of<4>(base, index + first));
#pragma unroll
      for (int e = 0; e < kPiece; ++e) raw.word[first + e] = piece.word[e];
    }
  } else {
    RawVector<kVec> piece;
    load_raw<2, LoadPolicy::kCached>(piece, address_of<2>(base, index));
#pragma unroll
    for (int w = 0; w < (kVec + 1) / 2; ++w) raw.word[w] = piece.word[w];
  }
}

template <int kVec>
__device__ __forceinline__ void widen_parameter(float (&value)[kVec], const RawParameter<kVec>& raw,
                                                DType dtype) {
  if (dtype == DType::kFloat32) {
#pragma unroll
    for (int e = 0; e < kVec; ++e) value[e] = __uint_as_float(raw.word[e]);
  } else {
    RawVector<kVec> piece{};
#pragma unroll
    for (int w = 0; w < (kVec + 1) / 2; ++w) piece.word[w] = raw.word[w];
    if (dtype == DType::kFloat16) {
      widen<DType::kFloat16>(value, piece);
    } else {
      widen<DType::kBFloat16>(value, piece);
    }
  }
}

// Stores fp32 results.
template <int kVec>
__device__ __forceinline__ void store_floats(float* base, int64_t index,
                                             const float (&value)[kVec]) {
  constexpr int kPiece = kVec == 1 ? 1 : 4;
#pragma unroll
  for (int first = 0; first < kVec; first += kPiece) {
    RawVector<kPiece> raw;
#pragma unroll
    for (int e = 0; e < kPiece; ++e) raw.word[e] = __float_as_uint(value[first + e]);
    store_raw<4>(address_of<4>(static_cast<void*>(base), index + first), raw);
  }
}

template <int kVec>
__device__ __forceinline__ void load_floats(float (&value)[kVec], const float* base,
                                            int64_t index) {
  RawParameter<kVec> raw;
  load_parameter(raw, base, DType::kFloat32, index);
  widen_parameter(value, raw, DType::kFloat32);
}

}  // namespace fused_lm
