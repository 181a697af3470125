// Uninitialised memory for the length of a call.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <new>

#include "kernels.h"

namespace mla_ext::cpu::MLA_EXT_ISA {

// Not std::unique_ptr: a standard template instantiated in every instruction set's build is one symbol to the linker,
// which may keep the copy that this CPU cannot run.
template <class T>
class Scratch {
 public:
  explicit Scratch(int64_t count) : data_(static_cast<T*>(std::malloc(sizeof(T) * (count > 0 ? count : 1)))) {
    if (data_ == nullptr) throw std::bad_alloc();
  }
  ~Scratch() { std::free(data_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  T* get() { return data_; }
  T& operator[](int64_t i) { return data_[i]; }

 private:
  T* data_;
};

// Runs a lambda (begin, end) over [0, n) through the C-style ParallelFor.
template <class F>
void parallel(ParallelFor parallel_for, int64_t n, int64_t grain, const F& body) {
  if (n == 0) return;
  auto call = [](int64_t begin, int64_t end, void* context) { (*static_cast<const F*>(context))(begin, end); };
  parallel_for(0, n, grain > 0 ? grain : 1, call, const_cast<F*>(&body));
}

}  // namespace mla_ext::cpu::MLA_EXT_ISA
