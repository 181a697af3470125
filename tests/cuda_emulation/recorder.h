// What the emulation tells a recorder, where one is linked in (recorder.cpp), and what the recorder asks.
#pragma once

#include <cstddef>
#include <cstdint>

namespace emulation {

enum class Scope { kWarp, kBlock, kGrid };  // of a barrier; a shuffle is one of the warp
enum class Space { kPrivate, kShared, kGlobal };

class Recorder {
 public:
  virtual ~Recorder() = default;
  /// An array in global memory. Its number is that of the call's array; the workspace is kWorkspace.
  virtual void allocate(const void* data, size_t bytes, int number) = 0;
  virtual void free(const void* data) = 0;
  virtual void begin(unsigned blocks, unsigned threads) = 0;  // a launch
  virtual void end() = 0;
  virtual void barrier(Scope scope, unsigned block, unsigned thread) = 0;  // is complete; one of the threads in it
  virtual void copy(const void* to, const void* from, size_t bytes) = 0;   // an asynchronous one starts
  virtual void landed(const void* to, size_t bytes) = 0;                   // and its thread has waited for it
};
extern Recorder* recorder;  // null: none
constexpr int kWorkspace = -1;

struct Running {
  bool inside;  // a kernel; else in the code that launches
  unsigned block, thread;
  bool in_order;  // all launches before have ended
};
Running running_thread();
Space space_of(const void* address);  // as the running thread sees it

/// Whether this run is to show that defect: the tests write the question into a copy of the kernels.
bool planted(int defect);

}  // namespace emulation
