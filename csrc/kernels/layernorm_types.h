// Which dtypes and vector widths the norm kernels are compiled for. A type row makes the dtypes of
// the kernel's arguments constants; AnyTypes leaves them to branches that the grid agrees on.
#pragma once

#include <cstdint>

#include "kernels/layernorm.h"

namespace fused_lm {

// x and dx; the residual stream and its gradients; y and dy. Parameters have any dtype.
template <DType kX, DType kStream, DType kY>
struct Types {
  static bool match(const NormForwardParams& p) {
    return p.x_dtype == kX && p.y_dtype == kY &&
           (p.residual == nullptr || p.residual_dtype == kStream) &&
           (p.stream == nullptr || p.stream_dtype == kStream);
  }

  static bool match(const NormBackwardParams& p) {
    return p.dx_dtype == kX && p.dy_dtype == kY && p.stream_dtype == kStream &&
           (p.dstream == nullptr || p.dstream_dtype == kStream) &&
           (p.dresidual == nullptr || p.dresidual_dtype == kStream);
  }

  static __device__ __forceinline__ NormForwardParams known(NormForwardParams p) {
    p.x_dtype = kX, p.y_dtype = kY, p.residual_dtype = kStream, p.stream_dtype = kStream;
    return p;
  }

  static __device__ __forceinline__ NormBackwardParams known(NormBackwardParams p) {
    p.dx_dtype = kX, p.dy_dtype = kY, p.stream_dtype = kStream;
    p.dstream_dtype = kStream, p.dresidual_dtype = kStream;
    return p;
  }
};

struct AnyTypes {
  template <class Params>
  static bool match(const Params&) {
    return true;
  }

  template <class Params>
  static __device__ __forceinline__ Params known(const Params& p) {
    return p;
  }
};

template <DType kDType>
using OneType = Types<kDType, kDType, kDType>;
// The residual stream stays in fp32.
template <DType kDType>
using Autocast = Types<kDType, DType::kFloat32, kDType>;
// torch.autocast's layer_norm returns fp32.
template <DType kDType>
using Widening = Types<kDType, kDType, DType::kFloat32>;

// Whether `width` elements from any row's start are one aligned vector of up to 16 bytes.
inline bool has_vectors(const void* base, DType dtype, int64_t stride, int width) {
  const int bytes = width * size_of(dtype);
  const uintptr_t alignment = bytes < 16 ? bytes : 16;
  return base == nullptr ||
         (stride % width == 0 && reinterpret_cast<uintptr_t>(base) % alignment == 0);
}

inline bool has_vectors(const NormForwardParams& p, int width) {
  return p.C % width == 0 && has_vectors(p.x, p.x_dtype, p.x_stride, width) &&
         has_vectors(p.residual, p.residual_dtype, p.residual_stride, width) &&
         has_vectors(p.weight, p.weight_dtype, 0, width) &&
         has_vectors(p.bias, p.bias_dtype, 0, width) && has_vectors(p.y, p.y_dtype, 0, width) &&
         has_vectors(p.stream, p.stream_dtype, 0, width);
}

inline bool has_vectors(const NormBackwardParams& p, int width) {
  return p.C % width == 0 && has_vectors(p.dy, p.dy_dtype, p.dy_stride, width) &&
         has_vectors(p.dstream, p.dstream_dtype, p.dstream_stride, width) &&
         has_vectors(p.stream, p.stream_dtype, p.stream_stride, width) &&
         has_vectors(p.weight, p.weight_dtype, 0, width) &&
         has_vectors(p.dx, p.dx_dtype, 0, width) &&
         has_vectors(p.dresidual, p.dresidual_dtype, 0, width) &&
         has_vectors(p.dweight_partial, DType::kFloat32, 0, width) &&
         has_vectors(p.dbias_partial, DType::kFloat32, 0, width);
}

// Elements per vector: 8 where the row has one 16-bit type, 4 where fp32 fills 16 bytes with them,
// 1 where rows are not aligned.
template <class Params>
int vector_width(const Params& p) {
  const bool uniform = OneType<DType::kBFloat16>::match(p) || OneType<DType::kFloat16>::match(p);
  if (uniform && has_vectors(p, 8)) return 8;
  return has_vectors(p, 4) ? 4 : 1;
}

template <int kWidth>
struct VectorWidth {
  static constexpr int value = kWidth;
};

// Calls body(type row, VectorWidth) for the instantiation that is for these arguments.
template <class Params, class Body>
Status with_type_row(const Params& p, int width, const Body& body) {
  constexpr DType kF32 = DType::kFloat32;
  constexpr DType kF16 = DType::kFloat16;
  constexpr DType kBF16 = DType::kBFloat16;
  if (width == 8) {
    return OneType<kBF16>::match(p) ? body(OneType<kBF16>{}, VectorWidth<8>{})
                                    : body(OneType<kF16>{}, VectorWidth<8>{});
  }
  if (width == 1) return body(AnyTypes{}, VectorWidth<1>{});
  if (OneType<kF32>::match(p)) return body(OneType<kF32>{}, VectorWidth<4>{});
  if (Autocast<kBF16>::match(p)) return body(Autocast<kBF16>{}, VectorWidth<4>{});
  if (Autocast<kF16>::match(p)) return body(Autocast<kF16>{}, VectorWidth<4>{});
  if (Widening<kBF16>::match(p)) return body(Widening<kBF16>{}, VectorWidth<4>{});
  if (Widening<kF16>::match(p)) return body(Widening<kF16>{}, VectorWidth<4>{});
  return body(AnyTypes{}, VectorWidth<4>{});
}

}  // namespace fused_lm
