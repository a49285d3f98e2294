// Fibers: functions with a stack of their own that hand the processor to one another.
#pragma once

#include <cstddef>

namespace emulator {

struct FiberState;  // what a switch saves

class Fiber {
 public:
  explicit Fiber(void (*entry)());  // entry must not return
  ~Fiber();
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  void resume();          // from the host's stack: runs the fiber until it calls suspend()
  static void suspend();  // from a fiber: back to where resume() was called
  void restart();         // forgets what the fiber was doing; its frames are not unwound

 private:
  static void start();
  void prepare();

  void (*entry_)();
  char* stack_;
  FiberState* state_;
};

}  // namespace emulator
