// Random inputs where libFuzzer is not: `program SEED SECONDS [INPUTS]`. Input i of a seed is always the same; when one
// fails, its number is printed.
#include <chrono>
#include <csignal>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size);

namespace {

volatile long long current;

void report(int) {
  std::fprintf(stderr, "failed: input %lld; `program %lld 0 1` repeats it\n", (long long)current, (long long)current);
  std::_Exit(1);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 3) return 2;
  std::signal(SIGABRT, report);
  const long long first = std::atoll(argv[1]), most = argc > 3 ? std::atoll(argv[3]) : -1;
  const auto end = std::chrono::steady_clock::now() + std::chrono::duration<double>(std::atof(argv[2]));
  long long inputs = 0;
  while (inputs != most && (most > 0 || std::chrono::steady_clock::now() < end)) {
    current = first + inputs++;
    std::mt19937_64 generator(static_cast<uint64_t>(current));
    std::vector<uint8_t> bytes(96);
    for (uint8_t& byte : bytes) byte = static_cast<uint8_t>(generator());
    LLVMFuzzerTestOneInput(bytes.data(), bytes.size());
  }
}
