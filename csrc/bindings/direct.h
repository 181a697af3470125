// Adds `step` and `feature_mean` to the Python module: functions that are called past PyTorch's dispatcher.
#pragma once

#include <Python.h>

namespace mla_ext::bindings {

// Returns 0, or -1 with a Python exception set.
int add_direct(PyObject* module);

}  // namespace mla_ext::bindings
