// A device for tests: its memory is the host's, but its tensors meet the CPU's only where they are copied, as a
// GPU's do. What torch has no kernel for here is computed by the CPU on copies, after a look at the arguments.
#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>
#include <ATen/autocast_mode.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/native/Resize.h>
#include <ATen/ops/_reshape_alias_cpu_dispatch.h>
#include <ATen/ops/as_strided_cpu_dispatch.h>
#include <ATen/ops/set_cpu_dispatch.h>
#include <ATen/ops/unfold_cpu_dispatch.h>
#include <ATen/ops/view_cpu_dispatch.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <c10/core/impl/alloc_cpu.h>
#include <torch/library.h>

namespace {

using at::SymIntArrayRef;
using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

const at::Device kHere(at::DeviceType::PrivateUse1, 0);
const at::DispatchKeySet kKeys(at::DispatchKey::PrivateUse1);

struct Memory final : at::Allocator {
  at::DataPtr allocate(size_t bytes) override {
    void* data = c10::alloc_cpu(bytes);
    return {data, data, &c10::free_cpu, kHere};
  }
  at::DeleterFnPtr raw_deleter() const override { return &c10::free_cpu; }
  void copy_data(void* to, const void* from, size_t count) const override { default_copy_data(to, from, count); }
};
Memory memory;
REGISTER_ALLOCATOR(c10::DeviceType::PrivateUse1, &memory);

struct Guard final : c10::impl::DeviceGuardImplInterface {
  static constexpr c10::DeviceType static_type = c10::DeviceType::PrivateUse1;
  static at::Stream only() { return at::Stream(at::Stream::DEFAULT, kHere); }
  at::DeviceType type() const override { return static_type; }
  at::Device exchangeDevice(at::Device) const override { return kHere; }
  at::Device getDevice() const override { return kHere; }
  void setDevice(at::Device) const override {}
  void uncheckedSetDevice(at::Device) const noexcept override {}
  at::Stream getStream(at::Device) const override { return only(); }
  at::Stream exchangeStream(at::Stream) const override { return only(); }
  at::DeviceIndex deviceCount() const noexcept override { return 1; }
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

struct Hooks final : at::PrivateUse1HooksInterface {
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  bool isAvailable() const override { return true; }
  at::Generator getNewGenerator(c10::DeviceIndex) const override { return at::detail::createCPUGenerator(); }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex) const override {
    return at::detail::getDefaultCPUGenerator();
  }
};
const bool registered = [] {
  at::RegisterPrivateUse1HooksInterface(new Hooks);
  return true;
}();

void refuse_mixture(bool mixed, const std::string& operation) {
  TORCH_CHECK(!mixed, "Expected all tensors to be on the same device, found the CPU's, too (", operation, ")");
}

// The same memory, seen as the CPU's
Tensor as_cpu(const Tensor& tensor) {
  refuse_mixture(!tensor.is_privateuseone(), "of a layer");
  const auto options = at::TensorOptions().dtype(tensor.scalar_type()).device(at::kCPU);
  return at::from_blob(const_cast<void*>(tensor.data_ptr()), tensor.sizes(), tensor.strides(), options);
}
OptionalTensor as_cpu(const OptionalTensor& tensor) {
  return tensor.has_value() && tensor->defined() ? OptionalTensor(as_cpu(*tensor)) : std::nullopt;
}
Tensor here(const Tensor& tensor) { return tensor.defined() ? tensor.to(kHere) : tensor; }

Tensor empty(at::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
             std::optional<at::Device>, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  return at::detail::empty_generic(size, &memory, kKeys, c10::dtype_or_default(dtype), format);
}
Tensor empty_strided(at::IntArrayRef size, at::IntArrayRef stride, std::optional<at::ScalarType> dtype,
                     std::optional<at::Layout>, std::optional<at::Device>, std::optional<bool>) {
  return at::detail::empty_strided_generic(size, stride, &memory, kKeys, c10::dtype_or_default(dtype));
}
Tensor copy_from(const Tensor& self, const Tensor& to, bool) {
  const auto seen = [](const Tensor& tensor) { return tensor.is_cpu() ? tensor : as_cpu(tensor); };
  seen(to).copy_(seen(self));
  return to;
}
Tensor copy_from_and_resize(const Tensor& self, const Tensor& to) {
  if (to.sizes() != self.sizes()) to.resize_(self.sizes());
  return copy_from(self, to, false);
}
at::Scalar item(const Tensor& self) { return at::_local_scalar_dense(as_cpu(self)); }
const Tensor& resize(const Tensor& self, SymIntArrayRef size, std::optional<at::MemoryFormat> format) {
  at::native::resize_impl_cpu_(self.unsafeGetTensorImpl(), C10_AS_INTARRAYREF_SLOW(size), std::nullopt);
  if (format.has_value()) self.unsafeGetTensorImpl()->empty_tensor_restride(*format);
  return self;
}
Tensor& set_storage(Tensor& self, at::Storage source) {
  return at::cpu::set_(self, source, 0, {static_cast<int64_t>(source.nbytes() / self.dtype().itemsize())}, {1});
}
Tensor& set_tensor(Tensor& self, const Tensor& source) {
  return at::cpu::set_(self, source.storage(), source.storage_offset(), source.sizes(), source.strides());
}

Tensor convolution(const Tensor& input, const Tensor& weight, const OptionalTensor& bias, SymIntArrayRef stride,
                   SymIntArrayRef padding, SymIntArrayRef dilation, bool transposed, SymIntArrayRef output_padding,
                   c10::SymInt groups) {
  return here(at::convolution_symint(as_cpu(input), as_cpu(weight), as_cpu(bias), stride, padding, dilation, transposed,
                                     output_padding, groups));
}
std::tuple<Tensor, Tensor, Tensor> convolution_backward(const Tensor& grad, const Tensor& input, const Tensor& weight,
                                                        SymIntArrayRef stride, SymIntArrayRef padding,
                                                        SymIntArrayRef dilation, bool transposed,
                                                        SymIntArrayRef output_padding, c10::SymInt groups,
                                                        std::array<bool, 3> mask) {
  const std::vector<c10::SymInt> bias{transposed ? weight.sym_size(1) * groups : weight.sym_size(0)};
  const auto [of_input, of_weight, of_bias] = at::convolution_backward_symint(
      as_cpu(grad), as_cpu(input), as_cpu(weight), at::OptionalSymIntArrayRef(bias), stride, padding, dilation, transposed,
      output_padding, groups, mask);
  return {here(of_input), here(of_weight), here(of_bias)};
}
// The fallback would lose the running statistics: the schema does not say that they change
std::tuple<Tensor, Tensor, Tensor> batch_norm(const Tensor& input, const OptionalTensor& weight,
                                              const OptionalTensor& bias, const OptionalTensor& mean,
                                              const OptionalTensor& variance, bool training, double momentum,
                                              double eps) {
  const auto [output, batch_mean, inverse] = at::native_batch_norm(
      as_cpu(input), as_cpu(weight), as_cpu(bias), as_cpu(mean), as_cpu(variance), training, momentum, eps);
  return {here(output), here(batch_mean), here(inverse)};
}

// Refuses what CUDA refuses: an operation on tensors of both, but for the CPU's single numbers and indices
void on_the_cpu(const c10::OperatorHandle& operation, torch::jit::Stack* stack) {
  const std::string& name = operation.schema().name();
  const bool takes_indices = name.rfind("aten::index", 0) == 0 || name.rfind("aten::_index_put", 0) == 0;
  bool ours = false, others = false;
  const auto look = [&](const Tensor& tensor) {
    if (!tensor.defined()) return;
    ours |= tensor.is_privateuseone();
    others |= tensor.is_cpu() && tensor.dim() > 0;
  };
  for (const at::IValue& value : torch::jit::last(*stack, operation.schema().arguments().size())) {
    if (value.isTensor()) {
      look(value.toTensor());
    } else if (value.isList() && !takes_indices) {
      for (const at::IValue& part : value.toList()) {
        if (part.isTensor()) look(part.toTensor());
      }
    }
  }
  refuse_mixture(ours && others, name);
  at::native::cpu_fallback(operation, stack);
}

}  // namespace

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&on_the_cpu>()); }
TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", &empty);
  m.impl("empty_strided", &empty_strided);
  m.impl("_copy_from", &copy_from);
  m.impl("_copy_from_and_resize", &copy_from_and_resize);
  m.impl("_local_scalar_dense", &item);
  m.impl("resize_", &resize);
  m.impl("set_.source_Storage", &set_storage);
  m.impl("set_.source_Tensor", &set_tensor);
  m.impl("set_.source_Storage_storage_offset", &at::cpu::set__symint);
  m.impl("as_strided", &at::cpu::as_strided_symint);
  m.impl("view", &at::cpu::view_symint);
  m.impl("_reshape_alias", &at::cpu::_reshape_alias_symint);
  m.impl("unfold", &at::cpu::unfold);
  m.impl("convolution_overrideable", &convolution);
  m.impl("convolution_backward_overrideable", &convolution_backward);
  m.impl("native_batch_norm", &batch_norm);
}
TORCH_LIBRARY_IMPL(_, AutocastPrivateUse1, m) { m.fallback(torch::CppFunction::makeFallthrough()); }
TORCH_LIBRARY_IMPL(aten, AutocastPrivateUse1, m) {
  KERNEL_PRIVATEUSEONE(conv2d, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(linear, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(matmul, lower_precision_fp)
}
