// Adds `plain_sgd` to the Python module.
#pragma once

#include <Python.h>

namespace mla_ext::bindings {

// Returns 0, or -1 with a Python exception set.
int add_plain_sgd(PyObject* module);

}  // namespace mla_ext::bindings
