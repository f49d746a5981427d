// ptx/wgmma.h for 48 columns of b, which few kernels need: in a file of its own, since a record of
// measurements holds for the very text that a kernel includes.
#pragma once

#include "ptx/wgmma.h"

namespace fused_lm::ptx {

#define FUSED_LM_TEXT_48 FUSED_LM_TEXT_32 ", %16, %17, %18, %19, %20, %21, %22, %23"
#define FUSED_LM_REGISTERS_48 FUSED_LM_D32(0), FUSED_LM_D16(4)

FUSED_LM_WGMMA(48, 24, 25, 26, 27, 28, 29, 30)

}  // namespace fused_lm::ptx
