// Runs a kernel's threads as fibres of one OS thread, in an order drawn from a seed. A fibre runs until it waits: at a
// barrier, or for the other lanes of its warp. So a missing barrier lets some thread read what is not yet written, and
// as all shared memory begins as NaN, the answer is wrong. Dynamic shared memory is an allocation of its exact size:
// under AddressSanitizer an access beyond it is reported, as is one beyond any array in global memory.
//
// With include/ it is some 500 lines, as it also checks what the device would refuse or hang on: shared memory not
// asked for, a cooperative launch too large, misaligned asynchronous copies, barriers that not all threads reach.
#include <elf.h>
#include <link.h>
#include <sys/mman.h>

#include <cstdio>
#include <cstdlib>
#include <deque>
#include <map>
#include <memory>
#include <random>
#include <vector>

#include "cuda_runtime.h"
#include "recorder.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#else
#define __sanitizer_start_switch_fiber(fake_stack, ...) static_cast<void>(fake_stack)
#define __sanitizer_finish_switch_fiber(...)
#define __asan_unpoison_memory_region(...)
#endif
#if !defined(__x86_64__)
#error "the fibres' switch is written for x86-64"
#endif

dim3 threadIdx, blockIdx, blockDim, gridDim;

// Saves the callee's registers on this stack, its pointer in *from, and goes on with another stack.
extern "C" void emulation_switch(void** from, void* to);
asm(R"(
.text
.globl emulation_switch
emulation_switch:
  pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
  ret
)");

namespace emulation {

Recorder* recorder = nullptr;

namespace {

constexpr unsigned kWarp = 32;
constexpr size_t kStackBytes = 64 * 1024;
constexpr unsigned kResidentThreads = 2048;  // of a launch without grid barrier: as many blocks run interleaved
constexpr int kFreeSharedBytes = 48 * 1024;  // what a kernel gets without asking
constexpr unsigned char kPoison = 0xff;      // bytes of a NaN in every floating-point type

const Device kDevices[] = {{132, 1, 232448}, {3, 1, 232448}, {40, 1, 166912},
                           {5, 2, 101376},   {1, 1, 101376}, {132, 1, 232448, 100}};

int device_index = 0;
int64_t launch_count = 0;
std::mt19937_64 generator;
std::map<std::pair<int, const void*>, int> raised_shared_bytes;  // of a device's kernel

[[noreturn]] void fail(const char* what) {
  std::fprintf(stderr, "CUDA emulation: %s (block %u, thread %u)\n", what, blockIdx.x, threadIdx.x);
  std::fflush(stderr);
  std::abort();
}

struct Fibre;
struct Barrier {
  Scope scope = Scope::kWarp;
  size_t expected = 0;
  std::vector<Fibre*> waiting;
};

struct Warp {
  Barrier barrier;
  alignas(16) unsigned char values[2][kWarp][8];  // of this exchange and of the next
};

struct Block {
  dim3 index;
  Barrier barrier;
  std::vector<Warp> warps;
  std::unique_ptr<unsigned char[]> dynamic_shared;
  size_t dynamic_bytes = 0;
  std::vector<unsigned char> static_shared;  // while another block runs
  std::vector<Fibre*> ready;
};

struct Copy {
  void* to;
  const void* from;  // null: it has happened
  size_t bytes;
};

struct Fibre {
  void* stack_pointer = nullptr;
  const void* stack = nullptr;
  size_t stack_bytes = 0;
  void* fake_stack = nullptr;  // AddressSanitizer's
  Block* block = nullptr;
  unsigned thread = 0;
  unsigned exchanges = 0;
  bool in_order = true;                     // after all launches before: a chained one has to wait for that
  std::deque<std::vector<Copy>> copies{1};  // committed groups, then the open one
};

Fibre launcher;  // the stack that launched
Fibre* current = &launcher;
Block* loaded_block = nullptr;  // whose variables are in static shared memory
Kernel current_kernel = {};
std::vector<Block*> runnable;  // have a fibre that is ready
Barrier grid{Scope::kGrid, 0, {}};
size_t running = 0;  // threads that have not returned

/// Where the __shared__ variables are: all thread-local storage of this program, which has no other.
struct Storage {
  unsigned char* data = nullptr;
  size_t bytes = 0;
  uintptr_t program_begin = UINTPTR_MAX, program_end = 0;  // and its constants and other variables
  Storage() {
    dl_iterate_phdr(
        [](dl_phdr_info* program, size_t, void* self) {  // the first is the executable
          auto& storage = *static_cast<Storage*>(self);
          for (int i = 0; i < program->dlpi_phnum; ++i) {
            const ElfW(Phdr) & part = program->dlpi_phdr[i];
            if (part.p_type == PT_TLS) {
              storage.data = static_cast<unsigned char*>(program->dlpi_tls_data);
              storage.bytes = part.p_memsz;
            } else if (part.p_type == PT_LOAD) {
              const uintptr_t begin = program->dlpi_addr + part.p_vaddr;
              storage.program_begin = std::min(storage.program_begin, begin);
              storage.program_end = std::max<uintptr_t>(storage.program_end, begin + part.p_memsz);
            }
          }
          return 1;
        },
        this);
  }
};
const Storage storage;

unsigned draw(size_t n) { return static_cast<unsigned>(generator() % n); }

/// Leaves the current fibre for another. A fibre that is done is never resumed.
void switch_to(Fibre* next, bool done = false) {
  if (next == current) return;
  if (next->block && next->block != loaded_block) {
    if (loaded_block) loaded_block->static_shared.assign(storage.data, storage.data + storage.bytes);
    std::copy(next->block->static_shared.begin(), next->block->static_shared.end(), storage.data);
    loaded_block = next->block;
  }
  Fibre* const self = current;
  current = next;
  if (next->block) {
    blockIdx = next->block->index;
    threadIdx = dim3(next->thread, 0, 0);
  }
  __sanitizer_start_switch_fiber(done ? nullptr : &self->fake_stack, next->stack, next->stack_bytes);
  emulation_switch(&self->stack_pointer, next->stack_pointer);
  __sanitizer_finish_switch_fiber(self->fake_stack, nullptr, nullptr);
}

void make_ready(Fibre* fibre) {
  if (fibre->block->ready.empty()) runnable.push_back(fibre->block);
  fibre->block->ready.push_back(fibre);
}

/// Takes an element out, any of them.
template <typename E>
E take(std::vector<E>& from) {
  std::swap(from[draw(from.size())], from.back());
  E element = from.back();
  from.pop_back();
  return element;
}

/// Any fibre that is ready, mostly of the same block: to change blocks is slow.
Fibre* take_ready() {
  if (runnable.empty()) return nullptr;
  Block* block = loaded_block;
  if (!block || block->ready.empty() || draw(4096) == 0) block = runnable[draw(runnable.size())];
  Fibre* fibre = take(block->ready);
  if (block->ready.empty()) runnable.erase(std::find(runnable.begin(), runnable.end(), block));
  return fibre;
}

void release_if_complete(Barrier& barrier) {
  if (barrier.waiting.empty() || barrier.waiting.size() < barrier.expected) return;
  if (recorder) {
    const Fibre* one = barrier.waiting.front();
    recorder->barrier(barrier.scope, one->block->index.x, one->thread);
  }
  for (Fibre* fibre : barrier.waiting) make_ready(fibre);
  barrier.waiting.clear();
}

void wait(Barrier& barrier) {
  barrier.waiting.push_back(current);
  release_if_complete(barrier);
  Fibre* next = take_ready();
  if (!next) fail("deadlock: some threads wait at a barrier or a shuffle that the others never reach");
  switch_to(next);
}

/// A thread that has returned counts as arrived at the block's barriers, as on the device, but not in its warp's.
void fibre_main() {
  __sanitizer_finish_switch_fiber(nullptr, launcher.stack ? nullptr : &launcher.stack,
                                  launcher.stack ? nullptr : &launcher.stack_bytes);
  current_kernel.call(current_kernel.arguments);
  if (!current->in_order) fail("a thread of a chained launch ended before the launch before it");
  Barrier& barrier = current->block->barrier;
  --barrier.expected;
  release_if_complete(barrier);
  Fibre* next = take_ready();
  --running;
  if (!next && running > 0) fail("deadlock: some threads returned, others wait");
  switch_to(next ? next : &launcher, true);
  fail("a thread that returned runs on");
}

unsigned char* stack_of(size_t index) {
  static std::vector<unsigned char*> stacks;
  while (stacks.size() <= index) {
    void* memory =
        mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) fail("no memory for a stack");
    stacks.push_back(static_cast<unsigned char*>(memory));
  }
  __asan_unpoison_memory_region(stacks[index], kStackBytes);  // what the last thread there left
  return stacks[index];
}

void run_blocks(const unsigned* indices, size_t count, unsigned threads, size_t shared_bytes, bool chained) {
  std::vector<Block> blocks(count);
  std::vector<Fibre> fibres(count * threads);
  for (size_t b = 0; b < count; ++b) {
    Block& block = blocks[b];
    block.index = dim3(indices[b], 0, 0);
    block.barrier = {Scope::kBlock, threads, {}};
    block.warps.resize((threads + kWarp - 1) / kWarp);
    for (size_t w = 0; w < block.warps.size(); ++w) {
      block.warps[w].barrier.expected = std::min<size_t>(kWarp, threads - w * kWarp);
    }
    block.static_shared.assign(storage.bytes, kPoison);
    if (shared_bytes > 0) {
      block.dynamic_shared.reset(new unsigned char[shared_bytes]);
      block.dynamic_bytes = shared_bytes;
      std::memset(block.dynamic_shared.get(), kPoison, shared_bytes);
    }
    for (unsigned t = 0; t < threads; ++t) {
      Fibre& fibre = fibres[b * threads + t];
      unsigned char* const stack = stack_of(b * threads + t);
      fibre.stack = stack;
      fibre.stack_bytes = kStackBytes;
      fibre.block = &block;
      fibre.thread = t;
      fibre.in_order = !chained;
      // Stacks begin at different places in their pages, or they would all compete for the same lines of the cache.
      const size_t used = 64 * ((b * threads + t) % 251);
      // Six registers, then where the switch returns to: at a function's entry the stack is 8 bytes off alignment.
      void** top = reinterpret_cast<void**>(stack + kStackBytes - used) - 2;
      *top = reinterpret_cast<void*>(&fibre_main);
      fibre.stack_pointer = top - 6;
      make_ready(&fibre);
    }
  }
  loaded_block = nullptr;
  grid.expected = running = fibres.size();
  switch_to(take_ready());
}

}  // namespace

void use_device(int index, uint64_t seed) {
  device_index = index;
  generator.seed(seed);
  launch_count = 0;
}

int64_t launches() { return launch_count; }

void run(const cudaLaunchConfig_t& launch, bool cooperative, bool chained, Kernel kernel) {
  const unsigned threads = launch.blockDim.x;
  gridDim = launch.gridDim;
  blockDim = launch.blockDim;
  current_kernel = kernel;
  ++launch_count;
  std::vector<unsigned> order(gridDim.x);
  for (unsigned i = 0; i < gridDim.x; ++i) order[i] = i;
  std::shuffle(order.begin(), order.end(), generator);
  if (recorder) recorder->begin(gridDim.x, threads);
  const size_t resident = cooperative ? order.size() : std::max(1u, kResidentThreads / threads);
  for (size_t first = 0; first < order.size(); first += resident) {
    const size_t count = std::min(resident, order.size() - first);
    run_blocks(&order[first], count, threads, launch.dynamicSmemBytes, chained);
  }
  if (recorder) recorder->end();
}

Running running_thread() {
  if (current == &launcher) return {};
  return {true, current->block->index.x, current->thread, current->in_order};
}

Space space_of(const void* address) {
  const auto in = [address](const void* begin, size_t bytes) {
    return address >= begin && address < static_cast<const unsigned char*>(begin) + bytes;
  };
  if (in(current->stack, current->stack_bytes)) return Space::kPrivate;
  if (in(storage.data, storage.bytes)) return Space::kShared;
  if (in(current->block->dynamic_shared.get(), current->block->dynamic_bytes)) return Space::kShared;
  const auto number = reinterpret_cast<uintptr_t>(address);  // in the program: constants, threadIdx and its like
  return storage.program_begin <= number && number < storage.program_end ? Space::kPrivate : Space::kGlobal;
}

const void* exchange(const void* value, size_t bytes, int source_lane_mask) {
  const unsigned lane = current->thread % kWarp;
  Warp& warp = current->block->warps[current->thread / kWarp];
  // Two sets of values in turn: a lane can be one exchange ahead of another, never two.
  auto& values = warp.values[current->exchanges++ % 2];
  if (bytes > sizeof(values[0])) fail("a shuffle of more than 8 bytes");
  std::memcpy(values[lane], value, bytes);
  wait(warp.barrier);
  return values[lane ^ static_cast<unsigned>(source_lane_mask)];
}

void block_barrier() { wait(current->block->barrier); }

void grid_barrier() { wait(grid); }

// On the device an asynchronous copy happens at any time until it is waited for: here at once, or not until then.
void copy_async(void* to, const void* from, size_t bytes) {
  const bool aligned = reinterpret_cast<uintptr_t>(to) % bytes == 0 && reinterpret_cast<uintptr_t>(from) % bytes == 0;
  if ((bytes != 4 && bytes != 8 && bytes != 16) || !aligned) fail("an asynchronous copy of odd size or alignment");
  if (recorder) recorder->copy(to, from, bytes);
  const bool now = draw(2) != 0;
  if (now) std::memcpy(to, from, bytes);
  current->copies.back().push_back({to, now ? nullptr : from, bytes});
}

void commit_copies() { current->copies.emplace_back(); }

void wait_copies(size_t groups_left) {
  while (current->copies.size() > groups_left + 1) {
    for (const Copy& copy : current->copies.front()) {
      if (copy.from) std::memcpy(copy.to, copy.from, copy.bytes);
      if (recorder) recorder->landed(copy.to, copy.bytes);
    }
    current->copies.pop_front();
  }
}

}  // namespace emulation

namespace mla_ext::cuda {
void wait_for_previous_launch() { emulation::current->in_order = true; }
unsigned char* dynamic_shared_memory() { return emulation::current->block->dynamic_shared.get(); }
}  // namespace mla_ext::cuda

cudaError_t cudaGetDevice(int* device) {
  *device = emulation::device_index;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  const emulation::Device& properties = emulation::kDevices[device];
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      *value = properties.multiprocessors;
      break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = properties.shared_bytes;
      break;
    case cudaDevAttrCooperativeLaunch:
      *value = 1;
      break;
  }
  return cudaSuccess;
}

int emulated_architecture() {  // the first to chain launches has more shared memory than those before
  return emulation::kDevices[emulation::device_index].shared_bytes > 200000 ? 90 : 80;
}

cudaError_t emulated_raise_shared_memory(const void* kernel, int bytes) {
  if (bytes > emulation::kDevices[emulation::device_index].shared_bytes) return cudaErrorInvalidValue;
  emulation::raised_shared_bytes[{emulation::device_index, kernel}] = bytes;
  return cudaSuccess;
}

cudaError_t emulated_occupancy(int* blocks, int threads, size_t shared_bytes) {
  const emulation::Device& device = emulation::kDevices[emulation::device_index];
  *blocks = threads <= 1024 && shared_bytes <= static_cast<size_t>(device.shared_bytes)
                ? device.blocks_per_multiprocessor
                : 0;
  return cudaSuccess;
}

cudaError_t emulated_launch_check(const void* kernel, unsigned blocks, size_t shared_bytes, bool cooperative) {
  const emulation::Device& device = emulation::kDevices[emulation::device_index];
  const auto raised = emulation::raised_shared_bytes.find({emulation::device_index, kernel});
  const int limit = raised == emulation::raised_shared_bytes.end() ? emulation::kFreeSharedBytes : raised->second;
  if (shared_bytes > static_cast<size_t>(limit)) return cudaErrorInvalidValue;
  if (blocks == 0) return cudaErrorInvalidConfiguration;
  if (cooperative &&
      blocks > static_cast<unsigned>(device.multiprocessors * device.blocks_per_multiprocessor - device.held_blocks)) {
    return cudaErrorCooperativeLaunchTooLarge;
  }
  return cudaSuccess;
}
