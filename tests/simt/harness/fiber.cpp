// Threads of a block as fibers: own stacks, switched by hand, told to AddressSanitizer.
#include <sys/mman.h>

#include "harness/state.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

// Saves the callee-saved registers (System V x86-64) on the old stack and takes those of the new.
asm(R"(
.text
.local simt_switch
.type simt_switch, @function
simt_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size simt_switch, .-simt_switch
)");
extern "C" void simt_switch(void** save, void* to);

namespace simt {
namespace {

constexpr size_t kStackBytes = 256 * 1024;
constexpr size_t kGuardBytes = 4096;
constexpr int kSavedRegisters = 6;

std::vector<char*> free_stacks;
void* scheduler_stack_pointer;
#if defined(__SANITIZE_ADDRESS__)
void* scheduler_asan_stack;
const void* scheduler_stack_bottom;
size_t scheduler_stack_bytes;
#endif

char* take_stack() {
  if (!free_stacks.empty()) {
    char* stack = free_stacks.back();
    free_stacks.pop_back();
    return stack;
  }
  void* p = mmap(nullptr, kStackBytes + kGuardBytes, PROT_READ | PROT_WRITE,
                 MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) throw Error("no memory for the stack of a thread");
  mprotect(p, kGuardBytes, PROT_NONE);
  return static_cast<char*>(p) + kGuardBytes;
}

void run_thread() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack_bottom, &scheduler_stack_bytes);
#endif
  (*block().body)();
  Fiber& fiber = self();
  fiber.state = State::kDone;
  --block().live;
  block().warps[fiber.warp].ready &= ~(1u << fiber.lane);
  return_to_scheduler();
  __builtin_unreachable();
}

}  // namespace

void start_fiber(Fiber& fiber) {
  fiber.stack = take_stack();
  auto* top = reinterpret_cast<void**>(fiber.stack + kStackBytes - 64);
  *--top = nullptr;  // run_thread's return address: it never returns
  *--top = reinterpret_cast<void*>(&run_thread);
  for (int i = 0; i < kSavedRegisters; ++i) *--top = nullptr;
  fiber.stack_pointer = top;
}

void resume(Fiber& fiber) {
  current_thread = &fiber;
  fiber.accesses = 0;
  ++counters.switches;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&scheduler_asan_stack, fiber.stack, kStackBytes);
#endif
  simt_switch(&scheduler_stack_pointer, fiber.stack_pointer);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(scheduler_asan_stack, nullptr, nullptr);
#endif
  current_thread = nullptr;
}

void return_to_scheduler() {
  Fiber& fiber = self();
#if defined(__SANITIZE_ADDRESS__)
  void** keep = fiber.state == State::kDone ? nullptr : &fiber.asan_stack;
  __sanitizer_start_switch_fiber(keep, scheduler_stack_bottom, scheduler_stack_bytes);
#endif
  simt_switch(&fiber.stack_pointer, scheduler_stack_pointer);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fiber.asan_stack, nullptr, nullptr);
#endif
}

void release_stack(Fiber& fiber) {
  if (fiber.stack == nullptr) return;
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(fiber.stack, kStackBytes);
#endif
  free_stacks.push_back(fiber.stack);
  fiber.stack = nullptr;
}

bool on_own_stack(const void* p) {
  return static_cast<size_t>(static_cast<const char*>(p) - self().stack) < kStackBytes;
}

}  // namespace simt
