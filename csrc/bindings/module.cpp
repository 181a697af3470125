// The Python module _C: loading it registers the operations (ops.cpp).
#include <pybind11/pybind11.h>

#include "bindings/direct.h"
#include "cpu/isa.h"

PYBIND11_MODULE(_C, module) {
  module.doc() = "Compiled operations of mla_ext, reachable as torch.ops.mla_ext.*";
  module.def("cpu_isa", &mla_ext::cpu::isa_name, "The instruction set that the CPU kernels use on this machine.");
  if (mla_ext::bindings::add_direct(module.ptr()) != 0) throw pybind11::error_already_set();
}
