// Before everything else in kernels, for the race build: the C library's copies go where their
// accesses are seen (hooks.cpp). g++ must take them for no builtins: it expands those after it has
// put its calls before loads and stores.
#pragma once

#include <cstddef>

extern "C" {
void* memcpy(void* to, const void* from, size_t n) noexcept __asm__("simt_memcpy");
void* memmove(void* to, const void* from, size_t n) noexcept __asm__("simt_memmove");
void* memset(void* to, int value, size_t n) noexcept __asm__("simt_memset");
}
