// plain_sgd(params, grads, momentum_buffers, ...): the step of all plain parameters of a group at once.
//
// A plain function rather than an op: the dispatcher takes 100 ns for each tensor of a list, DLPack's exchange, which
// PyTorch offers since 2.10, a tenth of it.
#include "bindings/plain_sgd.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <exception>
#include <limits>
#include <utility>
#include <vector>

#include "bindings/dlpack.h"
#include "cpu/isa.h"
#include "cpu/plain_sgd.h"

namespace {

namespace dlpack = mla_ext::bindings::dlpack;
using mla_ext::DType;
using mla_ext::cpu::PlainSgd;
using mla_ext::cpu::SgdTensor;

constexpr char kDoc[] =
    "plain_sgd(params, grads, momentum_buffers, is_first, lr, momentum, dampening, weight_decay, nesterov, maximize, "
    "grad_scale, fma) -> bool\n\n"
    "torch.optim.SGD's step, in place, of lists of tensors; momentum_buffers is empty without momentum. Returns False, "
    "and has changed nothing, where a tensor is not a dense one of float32 or float64 in CPU memory, a number not one "
    "of Python's that float32 holds, or two tensors share memory.";
constexpr Py_ssize_t kArguments = 12;

void parallel_for(int64_t begin, int64_t end, int64_t grain, mla_ext::cpu::Body body, void* context) {
  torch::stable::parallel_for(begin, end, grain, [&](int64_t first, int64_t last) { body(first, last, context); });
}

// What PyTorch is asked with, looked up once.
struct PyTorch {
  PyObject* tensor_type = nullptr;
  PyObject* parameter_type = nullptr;
  dlpack::View view = nullptr;  // null: this PyTorch does not offer it
} pytorch;

// Whether `object` is a tensor that the kernel can take, and where it is. Subclasses may be anything.
bool get_view(PyObject* object, dlpack::Tensor& view) {
  PyObject* type = reinterpret_cast<PyObject*>(Py_TYPE(object));
  if (type != pytorch.tensor_type && type != pytorch.parameter_type) return false;
  if (pytorch.view(object, &view) != 0) {
    PyErr_Clear();  // sparse, for example
    return false;
  }
  if (view.device_type != dlpack::kCpu || view.type_code != dlpack::kFloat || view.type_lanes != 1) return false;
  if (view.type_bits != 32 && view.type_bits != 64) return false;
  bool is_contiguous = true;
  int64_t expected = 1;
  for (int dim = view.ndim - 1; dim >= 0; --dim) {
    is_contiguous = is_contiguous && (view.shape[dim] == 1 || view.strides[dim] == expected);
    expected *= view.shape[dim];
  }
  return is_contiguous || expected == 0;
}

void* address(const dlpack::Tensor& view) { return static_cast<char*>(view.data) + view.byte_offset; }

// The memory of `object`, which is to have the dtype and shape of `param`; null where it has not.
bool get_memory_like(const dlpack::Tensor& param, PyObject* object, void*& memory) {
  dlpack::Tensor view;
  if (!get_view(object, view) || view.type_bits != param.type_bits || view.ndim != param.ndim ||
      !std::equal(view.shape, view.shape + view.ndim, param.shape)) {
    return false;
  }
  memory = address(view);
  return true;
}

// Whether no two tensors share memory: threads step several at once.
bool are_disjoint(const std::vector<SgdTensor>& tensors) {
  std::vector<std::pair<const char*, const char*>> ranges;
  for (const SgdTensor& tensor : tensors) {
    const int64_t bytes = tensor.size * (tensor.dtype == DType::Float64 ? 8 : 4);
    for (void* start : {tensor.weight, tensor.grad, tensor.momentum_buffer}) {
      if (start != nullptr) ranges.emplace_back(static_cast<char*>(start), static_cast<char*>(start) + bytes);
    }
  }
  std::sort(ranges.begin(), ranges.end());
  for (size_t i = 1; i < ranges.size(); ++i) {
    if (ranges[i].first < ranges[i - 1].second) return false;
  }
  return true;
}

// PyTorch raises an error for a number that is finite, but not as a float32.
bool get_number(PyObject* object, double& number) {
  if (!PyFloat_Check(object) && !PyLong_Check(object)) return false;
  number = PyFloat_AsDouble(object);
  if (number == -1 && PyErr_Occurred() != nullptr) {
    PyErr_Clear();  // an integer beyond all doubles
    return false;
  }
  return std::abs(number) <= std::numeric_limits<float>::max() || !std::isfinite(number);
}

// Lets other Python threads run, for as long as it lives.
struct WithoutGil {
  PyThreadState* thread = PyEval_SaveThread();
  ~WithoutGil() { PyEval_RestoreThread(thread); }
};

// Whether the step can be made by the kernel.
bool parse(PyObject* const* args, PlainSgd& step, std::vector<SgdTensor>& tensors) {
  PyObject *params = args[0], *grads = args[1], *buffers = args[2];
  const Py_ssize_t count = PyList_GET_SIZE(params);
  const bool has_momentum = PyList_GET_SIZE(buffers) > 0;
  tensors.reserve(count);
  for (Py_ssize_t i = 0; i < count; ++i) {
    dlpack::Tensor param;
    SgdTensor tensor{};
    if (!get_view(PyList_GET_ITEM(params, i), param)) return false;
    if (!get_memory_like(param, PyList_GET_ITEM(grads, i), tensor.grad)) return false;
    if (has_momentum && !get_memory_like(param, PyList_GET_ITEM(buffers, i), tensor.momentum_buffer)) return false;
    tensor.weight = address(param);
    tensor.begin = step.size;
    tensor.size = 1;
    for (int dim = 0; dim < param.ndim; ++dim) tensor.size *= param.shape[dim];
    tensor.dtype = param.type_bits == 64 ? DType::Float64 : DType::Float32;
    step.size += tensor.size;
    tensors.push_back(tensor);
  }
  step.tensors = tensors.data();
  step.count = count;
  double* numbers[] = {&step.lr, &step.momentum, &step.dampening, &step.weight_decay};
  for (int i = 0; i < 4; ++i) {
    if (!get_number(args[4 + i], *numbers[i])) return false;
  }
  if (!get_number(args[10], step.grad_scale)) return false;
  bool* flags[] = {&step.is_first, &step.nesterov, &step.maximize, &step.fma};
  const int places[] = {3, 8, 9, 11};
  for (int i = 0; i < 4; ++i) {
    const int flag = PyObject_IsTrue(args[places[i]]);
    if (flag < 0) {
      PyErr_Clear();
      return false;
    }
    *flags[i] = flag != 0;
  }
  return step.size <= mla_ext::cpu::kElementsOfOneThread || are_disjoint(tensors);
}

PyObject* plain_sgd(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (count != kArguments) {
    return PyErr_Format(PyExc_TypeError, "plain_sgd: expected %zd arguments, got %zd", kArguments, count);
  }
  const char* names[] = {"params", "grads", "momentum_buffers"};
  for (int i = 0; i < 3; ++i) {
    if (!PyList_Check(args[i])) {
      return PyErr_Format(PyExc_TypeError, "%s: expected a list, got %s", names[i], Py_TYPE(args[i])->tp_name);
    }
    const Py_ssize_t length = PyList_GET_SIZE(args[i]);
    if (length != PyList_GET_SIZE(args[0]) && !(i == 2 && length == 0)) {
      return PyErr_Format(PyExc_ValueError, "%s: expected one for each parameter, got %zd for %zd", names[i], length,
                          PyList_GET_SIZE(args[0]));
    }
  }
  if (pytorch.view == nullptr) Py_RETURN_FALSE;
  try {
    PlainSgd step{};
    std::vector<SgdTensor> tensors;
    if (!parse(args, step, tensors)) Py_RETURN_FALSE;
    const mla_ext::cpu::Kernels& kernels = mla_ext::cpu::kernels();
    const WithoutGil without_gil;
    kernels.plain_sgd(step, parallel_for);
  } catch (const std::exception& failure) {
    return PyErr_Format(PyExc_RuntimeError, "%s", failure.what());
  }
  Py_RETURN_TRUE;
}

// Where PyTorch has no such table, or one of another version, `view` stays null.
void find_view() {
  PyObject* table = PyObject_GetAttrString(pytorch.tensor_type, "__dlpack_c_exchange_api__");
  void* api = table == nullptr ? nullptr : PyCapsule_GetPointer(table, "dlpack_exchange_api");
  Py_XDECREF(table);
  PyErr_Clear();
  if (api == nullptr) return;
  const auto& exchange = *static_cast<const dlpack::ExchangeApi*>(api);
  if (exchange.major_version == dlpack::kMajorVersion) pytorch.view = exchange.view;
}

PyMethodDef methods[] = {
    {"plain_sgd", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(plain_sgd)), METH_FASTCALL, kDoc},
    {nullptr, nullptr, 0, nullptr}};

}  // namespace

namespace mla_ext::bindings {

int add_plain_sgd(PyObject* module) {
  PyObject* torch = PyImport_ImportModule("torch");
  if (torch == nullptr) return -1;
  PyObject* nn = PyObject_GetAttrString(torch, "nn");
  pytorch.tensor_type = PyObject_GetAttrString(torch, "Tensor");
  pytorch.parameter_type = nn == nullptr ? nullptr : PyObject_GetAttrString(nn, "Parameter");
  Py_XDECREF(nn);
  Py_DECREF(torch);
  if (pytorch.tensor_type == nullptr || pytorch.parameter_type == nullptr) return -1;
  find_view();
  return PyModule_AddFunctions(module, methods);
}

}  // namespace mla_ext::bindings
