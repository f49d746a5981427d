// Host twin of csrc/ptx/wgmma_n48.h: its products know every width.
#pragma once

#include "ptx/wgmma.h"
