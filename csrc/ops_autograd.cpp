// The training linear's node in the autograd graph, on the CPU and on a GPU: forward and backward are the ops of
// ops_*_training.cpp, so that a layer's pass crosses into Python once. `qat::X_fused_linear` takes what its backward needs as its
// last argument.
//
// The one file that needs torch's own headers: its stable ABI has no autograd. It is compiled beside the CPU's kernels.
#undef TORCH_TARGET_VERSION
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

namespace qat::autograd {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using torch::jit::Stack;

// What backward returns where a graph of it is asked for: the gradients, and an error for whoever differentiates them.
struct Once : torch::autograd::Function<Once> {
  static Tensor forward(AutogradContext*, const Tensor& gradient) { return gradient.detach(); }
  static variable_list backward(AutogradContext*, const variable_list&) {
    TORCH_CHECK(false, "trying to differentiate twice a function that was marked with @once_differentiable");
  }
};

// `gradients` of the op that `backward` names, for the inputs x, w and bias; each where it is needed.
variable_list gradients(const c10::OperatorHandle& backward, Stack& stack) {
  const bool again = at::GradMode::is_enabled() && stack[0].toTensor().requires_grad();
  {
    const at::AutoDispatchBelowADInplaceOrView below;
    backward.callBoxed(stack);
  }
  variable_list found;
  for (const auto& one : stack) {
    Tensor gradient = one.isNone() ? Tensor() : one.toTensor();
    found.push_back(again && gradient.defined() ? Once::apply(gradient.requires_grad_()) : gradient);
  }
  return found;
}

c10::IValue dtype_where(bool needed, const c10::IValue& dtype) { return needed ? dtype : c10::IValue(); }

// Ops::forward(x, w, bias, *arguments) gives y and four tensors that Ops::backward takes after the gradient of y.
template <class Ops>
struct Linear : torch::autograd::Function<Linear<Ops>> {
  static Tensor forward(AutogradContext* context, const c10::OperatorHandle& op, Stack* stack, const Tensor& x, const Tensor& w,
                        const std::optional<Tensor>& bias) {
    auto& data = context->saved_data;
    data["x"] = static_cast<int64_t>(x.scalar_type());
    if (bias) data["bias"] = static_cast<int64_t>(bias->scalar_type());
    if (Ops::kHard) data["bf16"] = stack->back();
    const at::AutoDispatchBelowADInplaceOrView below;
    op.callBoxed(stack);
    variable_list kept;
    for (size_t i = stack->size() - 4; i < stack->size(); ++i) kept.push_back((*stack)[i].toTensor());
    context->save_for_backward(std::move(kept));
    context->set_materialize_grads(false);
    return (*stack)[stack->size() - 5].toTensor();
  }

  // None for the op and the stack, which are no tensors, and then of x, w and bias.
  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow(Ops::kBackward, "");
    if (!grads[0].defined()) return variable_list(5);
    auto& data = context->saved_data;
    const bool biased = data.count("bias");
    Stack stack{grads[0]};
    for (auto& one : context->get_saved_variables()) stack.emplace_back(std::move(one));
    if (Ops::kHard) {
      const int64_t k = stack[1].toTensor().size(-1);
      stack.emplace_back(k);
      stack.emplace_back(data["bf16"]);
    }
    stack.emplace_back(dtype_where(context->needs_input_grad(0), data["x"]));
    stack.emplace_back(context->needs_input_grad(1));
    stack.emplace_back(biased ? dtype_where(context->needs_input_grad(2), data["bias"]) : c10::IValue());
    variable_list found(2);
    for (auto& one : gradients(op, stack)) found.push_back(std::move(one));
    return found;
  }
};

bool needs_gradient(const c10::IValue& value) { return value.isTensor() && value.toTensor().requires_grad(); }

template <class Ops>
void call(const c10::OperatorHandle& op, c10::DispatchKeySet, Stack* stack) {
  const auto* arguments = stack->data() + stack->size() - op.schema().arguments().size();
  if (!at::GradMode::is_enabled() ||
      !(needs_gradient(arguments[0]) || needs_gradient(arguments[1]) || needs_gradient(arguments[2]))) {
    const at::AutoDispatchBelowADInplaceOrView below;
    op.callBoxed(stack);
    return;
  }
  const Tensor x = arguments[0].toTensor(), w = arguments[1].toTensor();
  const std::optional<Tensor> bias = arguments[2].toOptional<Tensor>();
  Tensor y = Linear<Ops>::apply(op, stack, x, w, bias);
  (*stack)[stack->size() - 5] = std::move(y);
}

struct Cpu {
  static constexpr bool kHard = true;
  static constexpr const char* kBackward = "qat::cpu_fused_gradients";
};
struct CpuSoft {
  static constexpr bool kHard = false;
  static constexpr const char* kBackward = "qat::cpu_fused_soft_gradients";
};
struct Cuda {
  static constexpr bool kHard = true;
  static constexpr const char* kBackward = "qat::cuda_fused_gradients";
};

}  // namespace
}  // namespace qat::autograd

TORCH_LIBRARY_IMPL(qat, Autograd, m) {
  using namespace qat::autograd;
  m.impl("cpu_fused_linear", torch::CppFunction::makeFromBoxedFunction<&call<Cpu>>());
  m.impl("cpu_fused_soft", torch::CppFunction::makeFromBoxedFunction<&call<CpuSoft>>());
  m.impl("cuda_fused_linear", torch::CppFunction::makeFromBoxedFunction<&call<Cuda>>());
}
