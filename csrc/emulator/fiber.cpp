#include "fiber.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <new>

#if defined(__x86_64__) && defined(__linux__)
#define FASTCONV_FIBER_ASSEMBLY 1
#else
#include <ucontext.h>
#endif

#if defined(__SANITIZE_ADDRESS__)
#define FASTCONV_FIBER_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define FASTCONV_FIBER_ASAN 1
#endif
#endif
#if defined(FASTCONV_FIBER_ASAN)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#if defined(FASTCONV_FIBER_ASSEMBLY)
// void fastconv_emulator_switch(void** save, void* to): pushes what a call must preserve, swaps stacks, pops.
asm(R"(
.text
.p2align 4
.hidden fastconv_emulator_switch
.globl fastconv_emulator_switch
.type fastconv_emulator_switch, @function
fastconv_emulator_switch:
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
.size fastconv_emulator_switch, .-fastconv_emulator_switch
)");
extern "C" void fastconv_emulator_switch(void** save, void* to) __attribute__((visibility("hidden")));
#endif

namespace emulator {
namespace {

#if defined(FASTCONV_FIBER_ASAN)
constexpr size_t stack_bytes = 512 << 10;  // the sanitizer's frames are larger
#else
constexpr size_t stack_bytes = 128 << 10;
#endif

#if defined(FASTCONV_FIBER_ASSEMBLY)
using Context = void*;  // the stack pointer; everything else lies on the stack
void swap(Context* save, Context* to) { fastconv_emulator_switch(save, *to); }
#else
using Context = ucontext_t;
void swap(Context* save, Context* to) { swapcontext(save, to); }
#endif

size_t page_bytes() { return size_t(sysconf(_SC_PAGESIZE)); }

Context host;
Fiber* running = nullptr;

#if defined(FASTCONV_FIBER_ASAN)
void* host_fake_stack = nullptr;
const void* host_bottom = nullptr;
size_t host_size = 0;
#endif

}  // namespace

struct FiberState {
  Context context;
#if defined(FASTCONV_FIBER_ASAN)
  void* fake_stack = nullptr;
#endif
};

Fiber::Fiber(void (*entry)()) : entry_(entry), state_(new FiberState) {
  // The page below the stack stays forbidden: an overflow ends in a fault, not in another fiber's data.
  void* memory = mmap(nullptr, stack_bytes + page_bytes(), PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  stack_ = static_cast<char*>(memory) + page_bytes();
  if (mprotect(stack_, stack_bytes, PROT_READ | PROT_WRITE) != 0) throw std::bad_alloc();
  prepare();
}

Fiber::~Fiber() {
  munmap(stack_ - page_bytes(), stack_bytes + page_bytes());
  delete state_;
}

void Fiber::prepare() {
#if defined(FASTCONV_FIBER_ASSEMBLY)
  void** top = reinterpret_cast<void**>(stack_ + stack_bytes);
  *--top = nullptr;  // start()'s return address: none; also aligns its frame to 16 bytes
  *--top = reinterpret_cast<void*>(&Fiber::start);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  state_->context = top;
#else
  getcontext(&state_->context);
  state_->context.uc_stack.ss_sp = stack_;
  state_->context.uc_stack.ss_size = stack_bytes;
  state_->context.uc_link = nullptr;
  makecontext(&state_->context, &Fiber::start, 0);
#endif
}

void Fiber::start() {
#if defined(FASTCONV_FIBER_ASAN)
  __sanitizer_finish_switch_fiber(running->state_->fake_stack, &host_bottom, &host_size);
#endif
  running->entry_();
  __builtin_trap();
}

void Fiber::resume() {
  running = this;
#if defined(FASTCONV_FIBER_ASAN)
  __sanitizer_start_switch_fiber(&host_fake_stack, stack_, stack_bytes);
#endif
  swap(&host, &state_->context);
#if defined(FASTCONV_FIBER_ASAN)
  __sanitizer_finish_switch_fiber(host_fake_stack, nullptr, nullptr);
#endif
  running = nullptr;
}

void Fiber::suspend() {
  Fiber* self = running;
#if defined(FASTCONV_FIBER_ASAN)
  __sanitizer_start_switch_fiber(&self->state_->fake_stack, host_bottom, host_size);
#endif
  swap(&self->state_->context, &host);
#if defined(FASTCONV_FIBER_ASAN)
  __sanitizer_finish_switch_fiber(self->state_->fake_stack, &host_bottom, &host_size);
#endif
}

void Fiber::restart() {
#if defined(FASTCONV_FIBER_ASAN)
  __asan_unpoison_memory_region(stack_, stack_bytes);
  state_->fake_stack = nullptr;
#endif
  prepare();
}

}  // namespace emulator
