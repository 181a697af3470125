// Sees every access of the kernels to memory: they are compiled with -fsanitize=thread, and linked with the callbacks
// below instead of its library. Prints a line of JSON for each launch: bytes and sectors of each array in global
// memory, bytes and bank conflicts of shared memory, and what is wrong in some order of the threads:
// - two threads access the same bytes, one of them writes, and no barrier lies between;
// - a chained launch touches global memory before the launch before it has ended;
// - bytes are used that an asynchronous copy may still be writing, or shared memory that nobody has written;
// - an access lies outside of all arrays, or is not aligned to its size: then the program stops.
//
// A request is what the lanes of a warp do at one instruction at a time: the n-th access of each, to the same array,
// since the last barrier or shuffle. Where lanes leave a loop before others, what follows is not told apart.
#include "recorder.h"

#include <algorithm>
#include <array>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <memory>
#include <string>
#include <tuple>
#include <unordered_map>
#include <vector>

namespace emulation {
namespace {

constexpr unsigned kWarp = 32;
constexpr uintptr_t kSectorBytes = 32, kWordBytes = 4, kBanks = 32;
constexpr uintptr_t kGranuleBytes = 2, kGranules = 256;  // races are told apart by granules, which lie in pages
constexpr unsigned kNobody = ~0u, kSeveral = ~1u;
constexpr int kShared = -2;  // as an array's number

enum class Kind { kRead, kWrite, kCopy };  // kCopy: an asynchronous write

using Instruction = std::tuple<const void*, int, bool>;  // program counter, array, whether it writes
struct Access {
  uintptr_t address, bytes;
};
using Request = std::vector<Access>;  // one access of each lane that takes part

/// A thread, and how many barriers of its block and of the grid were complete.
struct Moment {
  unsigned block = kNobody, thread = kNobody, block_epoch = 0, grid_epoch = 0;

  bool ordered_before(const Moment& later) const {
    if (block == kNobody || grid_epoch < later.grid_epoch) return true;
    return block == later.block && (block_epoch < later.block_epoch || thread == later.thread);
  }
};

struct Granule {
  Moment written, read;  // last
  bool in_flight = false;
};
using Page = std::array<Granule, kGranules>;

struct Traffic {
  uint64_t read = 0, written = 0;         // bytes, as often as they are asked for
  uint64_t sectors = 0, ideal = 0;        // of global memory; the fewest, were each request's bytes side by side
  uint64_t wavefronts = 0, smallest = 0;  // of shared memory; the fewest, were no two words in one bank
};

[[noreturn]] void stop(const char* what, const Running& running) {
  std::fprintf(stderr, "%s: block %u, thread %u\n", what, running.block, running.thread);
  std::abort();
}

/// The distinct multiples of `unit` bytes that the accesses [begin, end) touch.
std::vector<uintptr_t> touched(const Access* begin, const Access* end, uintptr_t unit) {
  std::vector<uintptr_t> units;
  for (const Access* a = begin; a != end; ++a) {
    for (uintptr_t u = a->address / unit; u <= (a->address + a->bytes - 1) / unit; ++u) units.push_back(u);
  }
  std::sort(units.begin(), units.end());
  units.erase(std::unique(units.begin(), units.end()), units.end());
  return units;
}

void count(const Request& request, bool write, bool shared, Traffic& traffic) {
  const Access *const begin = request.data(), *const end = begin + request.size();
  for (const Access& access : request) (write ? traffic.written : traffic.read) += access.bytes;
  if (!shared) {
    traffic.sectors += touched(begin, end, kSectorBytes).size();
    traffic.ideal += (touched(begin, end, kWordBytes).size() * kWordBytes + kSectorBytes - 1) / kSectorBytes;
    return;
  }
  // As many lanes are served at a time as 128 bytes suffice for.
  const size_t lanes = kBanks * kWordBytes / std::max(begin->bytes, kWordBytes);
  for (size_t i = 0; i < request.size(); i += lanes) {
    std::array<uint64_t, kBanks> words = {};
    const Access* const part_end = begin + std::min(i + lanes, request.size());
    for (const uintptr_t word : touched(begin + i, part_end, kWordBytes)) ++words[word % kBanks];
    traffic.wavefronts += *std::max_element(words.begin(), words.end());
    ++traffic.smallest;
  }
}

class Recording final : public Recorder {
 public:
  Recording() { recorder = this; }

  void allocate(const void* data, size_t bytes, int number) override {
    arrays_[reinterpret_cast<uintptr_t>(data)] = {bytes, number};
  }
  void free(const void* data) override { arrays_.erase(reinterpret_cast<uintptr_t>(data)); }

  void begin(unsigned blocks, unsigned threads) override {
    threads_ = threads;
    logs_.assign(size_t{blocks} * threads, {});
    block_epochs_.assign(blocks, 0);
    grid_epoch_ = 0;
    shadow_.clear();
    page_ = nullptr;
    traffic_.clear();
    wrong_.clear();
  }

  void end() override {
    make_requests(0, logs_.size());
    std::printf("{\"blocks\": %zu, \"threads\": %zu, \"traffic\": {", block_epochs_.size(), threads_);
    const char* comma = "";
    for (const auto& [array, t] : traffic_) {
      std::printf("%s\"%d\": [%zu, %zu, %zu, %zu, %zu, %zu]", comma, array, size_t{t.read}, size_t{t.written},
                  size_t{t.sectors}, size_t{t.ideal}, size_t{t.wavefronts}, size_t{t.smallest});
      comma = ", ";
    }
    std::printf("}, \"wrong\": {");
    comma = "";
    for (const auto& [what, where] : wrong_) {
      std::printf("%s\"%s\": \"block %u, thread %u\"", comma, what.c_str(), where.block, where.thread);
      comma = ", ";
    }
    std::printf("}}\n");
  }

  void barrier(Scope scope, unsigned block, unsigned thread) override {
    const size_t first = block * threads_, last = first + threads_, warp = first + thread / kWarp * kWarp;
    if (scope == Scope::kWarp) {
      make_requests(warp, std::min(warp + kWarp, last));
    } else if (scope == Scope::kBlock) {
      make_requests(first, last);
      ++block_epochs_[block];
    } else {
      make_requests(0, logs_.size());
      ++grid_epoch_;
    }
  }

  void copy(const void* to, const void* from, size_t bytes) override {  // two instructions, of no address
    see(nullptr, from, bytes, Kind::kRead);
    see(nullptr, to, bytes, Kind::kCopy);
  }

  void landed(const void* to, size_t bytes) override {
    const Moment now = moment(running_thread());
    for_granules(reinterpret_cast<uintptr_t>(to), bytes, now.block, [&](Granule& granule) {
      granule.written = now;
      granule.in_flight = false;
    });
  }

  void see(const void* pc, const void* pointer, size_t bytes, Kind kind) {
    const Running running = running_thread();
    const Space space = running.inside ? space_of(pointer) : Space::kPrivate;
    if (space == Space::kPrivate) return;
    const auto address = reinterpret_cast<uintptr_t>(pointer);
    if ((bytes & (bytes - 1)) == 0 && address % bytes != 0) {
      stop("a misaligned access", running);
    }
    int array = kShared;
    if (space == Space::kGlobal) {
      const auto after = arrays_.upper_bound(address);
      if (after == arrays_.begin() || address + bytes > std::prev(after)->first + std::prev(after)->second.bytes) {
        stop("an access outside of all arrays", running);
      }
      array = std::prev(after)->second.number;
    }
    check_order(address, bytes, kind, space, running);
    logs_[running.block * threads_ + running.thread][{pc, array, kind != Kind::kRead}].push_back({address, bytes});
  }

 private:
  struct Array {
    size_t bytes;
    int number;
  };

  Moment moment(const Running& r) const { return {r.block, r.thread, block_epochs_[r.block], grid_epoch_}; }

  /// `block` is kNobody for global memory. Shared memory is each block's own, though at the address of another's.
  template <typename Visit>
  void for_granules(uintptr_t address, size_t bytes, unsigned block, Visit visit) {
    for (uintptr_t g = address / kGranuleBytes; g <= (address + bytes - 1) / kGranuleBytes; ++g) {
      const uintptr_t key = g / kGranules ^ uintptr_t{block + 1} << 48;
      if (!page_ || key != page_key_) {
        std::unique_ptr<Page>& page = shadow_[key];
        if (!page) page = std::make_unique<Page>();
        page_ = page.get();
        page_key_ = key;
      }
      visit((*page_)[g % kGranules]);
    }
  }

  void check_order(uintptr_t address, size_t bytes, Kind kind, Space space, const Running& running) {
    const Moment now = moment(running);
    const bool shared = space == Space::kShared;
    const auto wrong = [&](const char* what) { wrong_.try_emplace(what, running); };
    if (!running.in_order && !shared) wrong("before the previous launch has ended");
    for_granules(address, bytes, shared ? running.block : kNobody, [&](Granule& granule) {
      Moment& reader = granule.read;
      const bool after_reads = reader.ordered_before(now);
      const bool racing = !granule.written.ordered_before(now) || (kind != Kind::kRead && !after_reads);
      if (granule.in_flight) wrong("copy in flight");
      if (racing) wrong(shared ? "race in shared memory" : "race in global memory");
      if (kind != Kind::kRead) {
        granule.written = now;
        granule.in_flight = kind == Kind::kCopy;
        return;
      }
      if (shared && granule.written.block == kNobody) wrong("read before written");
      if (after_reads) {
        reader = now;
      } else {
        reader.thread = kSeveral;
        if (reader.block != now.block) reader.block = kSeveral;
      }
    });
  }

  /// Of what the threads [first, last) of the launch have done since the last time: whole warps, at a barrier.
  void make_requests(size_t first, size_t last) {
    for (size_t warp = first, end; warp < last; warp = end) {
      end = std::min({warp + kWarp, last, warp - warp % threads_ + threads_});
      std::map<Instruction, std::vector<Request>> requests;
      for (size_t lane = warp; lane < end; ++lane) {
        for (const auto& [instruction, accesses] : logs_[lane]) {
          std::vector<Request>& of_instruction = requests[instruction];
          of_instruction.resize(std::max(of_instruction.size(), accesses.size()));
          for (size_t n = 0; n < accesses.size(); ++n) of_instruction[n].push_back(accesses[n]);
        }
        logs_[lane].clear();
      }
      for (const auto& [instruction, of_instruction] : requests) {
        const auto [pc, array, write] = instruction;
        for (const Request& request : of_instruction) count(request, write, array == kShared, traffic_[array]);
      }
    }
  }

  std::map<uintptr_t, Array> arrays_;
  size_t threads_ = 0;                                            // of a block
  std::vector<std::map<Instruction, std::vector<Access>>> logs_;  // of each thread, in order
  std::vector<unsigned> block_epochs_;
  unsigned grid_epoch_ = 0;
  std::unordered_map<uintptr_t, std::unique_ptr<Page>> shadow_;
  Page* page_ = nullptr;  // the last that was looked for
  uintptr_t page_key_ = 0;
  std::map<int, Traffic> traffic_;
  std::map<std::string, Running> wrong_;  // and who was the first
} recording;

}  // namespace

bool planted(int defect) {
  static const char* const chosen = std::getenv("MLA_EXT_PLANTED");
  return chosen && std::atoi(chosen) == defect;
}

}  // namespace emulation

#define SEE(kind, n) emulation::recording.see(__builtin_return_address(0), address, n, emulation::Kind::kind)
#define CALLBACKS(n)                                    \
  void __tsan_read##n(void* address) { SEE(kRead, n); } \
  void __tsan_write##n(void* address) { SEE(kWrite, n); }

extern "C" {
CALLBACKS(1)
CALLBACKS(2)
CALLBACKS(4)
CALLBACKS(8)
CALLBACKS(16)
void __tsan_read_range(void* address, size_t bytes) { SEE(kRead, bytes); }
void __tsan_write_range(void* address, size_t bytes) { SEE(kWrite, bytes); }
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
}
