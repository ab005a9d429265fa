// The training linear as one op, and its node in the autograd graph, on the CPU and on a GPU: `qat::X_fused_linear` calls the ops
// of ops_*_training.cpp, forward and backward, so that a layer's pass crosses into Python once and takes no more than y along.
//
// The one file that needs torch's own headers: its stable ABI has no autograd. It is compiled beside the CPU's kernels.
#undef TORCH_TARGET_VERSION
#include <ATen/autocast_mode.h>
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

void below(const c10::OperatorHandle& op, Stack& stack) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  op.callBoxed(stack);
}

// `gradients` of the op that `backward` names, for the inputs x, w and bias; each where it is needed.
void gradients(const c10::OperatorHandle& backward, Stack& stack, variable_list& found) {
  const bool again = at::GradMode::is_enabled() && stack[0].toTensor().requires_grad();
  below(backward, stack);
  for (auto& one : stack) {
    Tensor gradient = one.isNone() ? Tensor() : std::move(one).toTensor();
    found.push_back(again && gradient.defined() ? Once::apply(gradient.requires_grad_()) : std::move(gradient));
  }
}

template <class Ops>
void forward(Stack& stack) {
  static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow(Ops::kForward, "");
  below(op, stack);
}

// What a GPU's op kept of x, for the next layers that get the same x: q, k and v of a decoder, or gate and up. A node of another
// layer then saves the same memory, as nodes of nn.Linear save the same x.
//
// Nothing is kept alive for that: both x and what is kept are held weakly, the latter by the nodes alone. It is given for the
// same tensor, of the same memory and version, quantized in the same way; the op itself compares stream and capture. One x a
// thread is enough, as layers that share one run in a row.
class Quantized {
 public:
  struct How {
    c10::IValue per_tensor, eps;
    at::ScalarType dtype;
  };

  Quantized(const Tensor& x, const How& how, const Tensor& kept, int64_t stream, int64_t capture)
      : x_(x.getIntrusivePtr()), memory_(x.storage().getWeakStorageImpl()), kept_(kept.storage().getWeakStorageImpl()),
        sizes_(x.sizes()), strides_(x.strides()), offset_(x.storage_offset()), version_(x._version()), how_(how), stream_(stream),
        capture_(capture) {}

  // (what is kept of x, the stream and the capture that made it); without the first where x is another.
  static void find(const Tensor& x, const How& how, Stack& stack) {
    const auto kept = last() ? last()->kept_of(x, how) : c10::intrusive_ptr<c10::StorageImpl>();
    stack.push_back(kept ? c10::IValue(bytes_of(kept)) : c10::IValue());
    stack.emplace_back(kept ? last()->stream_ : 0);
    stack.emplace_back(kept ? last()->capture_ : 0);
  }

  static std::optional<Quantized>& last() {
    static thread_local std::optional<Quantized> one;
    return one;
  }

 private:
  // The addresses are of no others: who is held weakly is destroyed, but not forgotten.
  c10::intrusive_ptr<c10::StorageImpl> kept_of(const Tensor& x, const How& how) const {
    const bool same = x_.lock() == x.getIntrusivePtr() && memory_.lock().get() == x.storage().unsafeGetStorageImpl() &&
                      sizes_ == x.sizes() && strides_ == x.strides() && offset_ == x.storage_offset() &&
                      version_ == x._version() && how_.dtype == how.dtype &&
                      how_.per_tensor.toBool() == how.per_tensor.toBool() && how_.eps.toDouble() == how.eps.toDouble();
    return same ? kept_.lock() : c10::intrusive_ptr<c10::StorageImpl>();
  }

  // A tensor of that memory: hooks of saved tensors, as those of checkpoints, may have left no other.
  static Tensor bytes_of(const c10::intrusive_ptr<c10::StorageImpl>& memory) {
    const auto key = c10::computeDispatchKey(at::kByte, at::kStrided, memory->device());
    Tensor bytes = at::detail::make_tensor<c10::TensorImpl>(c10::Storage(memory), c10::DispatchKeySet(key),
                                                            caffe2::TypeMeta::Make<uint8_t>());
    bytes.unsafeGetTensorImpl()->set_sizes_contiguous({static_cast<int64_t>(memory->nbytes())});
    return bytes;
  }

  c10::weak_intrusive_ptr<c10::TensorImpl, c10::UndefinedTensorImpl> x_;
  c10::weak_intrusive_ptr<c10::StorageImpl> memory_, kept_;
  at::DimVector sizes_, strides_;
  int64_t offset_, version_;
  How how_;
  int64_t stream_, capture_;
};

// Ops::kForward(x, w, bias, ...) gives y and what Ops::kBackward takes after the gradient of y; `rest` is what it takes then, and
// at last which gradients are needed.
template <class Ops>
struct Linear : torch::autograd::Function<Linear<Ops>> {
  static Tensor forward(AutogradContext* context, Stack* stack, std::vector<c10::IValue>* rest, const Tensor& x, const Tensor& w,
                        const std::optional<Tensor>& bias) {
    rest->emplace_back(static_cast<int64_t>(x.scalar_type()));
    rest->push_back(bias ? c10::IValue(static_cast<int64_t>(bias->scalar_type())) : c10::IValue());
    context->saved_data["rest"] = c10::ivalue::Tuple::create(std::move(*rest));
    Ops::run(*stack, x, true);
    variable_list kept;
    kept.reserve(stack->size() - 1);
    for (size_t i = 1; i < stack->size(); ++i) kept.push_back(std::move((*stack)[i]).toTensor());
    context->save_for_backward(std::move(kept));
    context->set_materialize_grads(false);
    return std::move((*stack)[0]).toTensor();
  }

  // None for the stack and the rest, which are no tensors, and then of x, w and bias.
  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow(Ops::kBackward, "");
    if (!grads[0].defined()) return variable_list(5);
    const auto tuple = context->saved_data["rest"].toTuple();
    const auto& rest = tuple->elements();
    const size_t count = rest.size() - 2;
    Stack stack;
    stack.reserve(12);
    stack.emplace_back(grads[0]);
    for (auto& one : context->get_saved_variables()) stack.emplace_back(std::move(one));
    for (size_t i = 0; i < count; ++i) stack.push_back(rest[i]);
    const bool biased = !rest[count + 1].isNone();
    stack.push_back(context->needs_input_grad(0) ? rest[count] : c10::IValue());
    stack.emplace_back(context->needs_input_grad(1));
    stack.push_back(biased && context->needs_input_grad(2) ? rest[count + 1] : c10::IValue());
    variable_list found(2);
    found.reserve(5);
    gradients(op, stack, found);
    return found;
  }
};

// Whether the ops take these; `qat.ops` knows what to do with others, and what to say of them.
bool served(const Tensor& x, const Tensor& w, const std::optional<Tensor>& bias) {
  const auto type = x.scalar_type();
  return x.layout() == at::kStrided && (type == at::kFloat || type == at::kBFloat16 || type == at::kHalf) &&
         x.device() == w.device() && x.dim() > 0 && x.size(-1) == w.size(1) && x.numel() > 0 && w.scalar_type() == at::kFloat &&
         w.is_contiguous() &&
         (!bias || (bias->is_floating_point() && bias->dim() == 1 && bias->size(0) == w.size(0) && bias->device() == w.device()));
}

// y of (x, w, bias, ...) in autocast's dtype or else that of x; None where that is not served.
template <class Ops>
void call(const c10::OperatorHandle& op, Stack* stack) {
  const auto first = stack->end() - static_cast<int64_t>(op.schema().arguments().size());
  Stack inputs(std::make_move_iterator(first), std::make_move_iterator(stack->end()));
  stack->erase(first, stack->end());
  const Tensor x = inputs[0].toTensor(), w = inputs[1].toTensor();
  const std::optional<Tensor> bias = inputs[2].toOptional<Tensor>();
  if (!served(x, w, bias) || !Ops::takes(inputs)) {
    stack->emplace_back();
    return;
  }
  std::vector<c10::IValue> rest = Ops::rest(inputs, w);
  const auto device = x.device().type();
  const bool cast = at::autocast::is_autocast_enabled(device);
  inputs.emplace_back(static_cast<int64_t>(cast ? at::autocast::get_autocast_dtype(device) : x.scalar_type()));
  if (at::GradMode::is_enabled() && (x.requires_grad() || w.requires_grad() || (bias && bias->requires_grad()))) {
    stack->emplace_back(Linear<Ops>::apply(&inputs, &rest, x, w, bias));
    return;
  }
  Ops::run(inputs, x, false);
  stack->push_back(std::move(inputs[0]));
}

c10::IValue popped(Stack& inputs) {
  c10::IValue last = std::move(inputs.back());
  inputs.pop_back();
  return last;
}

// `rest` takes what the backward pass alone reads from the inputs; `run` is the forward pass, `kept` for a backward pass or not.
struct Cpu {
  static constexpr const char* kForward = "qat::cpu_fused_forward";
  static constexpr const char* kBackward = "qat::cpu_fused_gradients";
  static bool takes(const Stack&) { return true; }
  static std::vector<c10::IValue> rest(Stack& inputs, const Tensor&) { return {popped(inputs)}; }
  static void run(Stack& stack, const Tensor&, bool) { forward<Cpu>(stack); }
};
struct CpuSoft {
  static constexpr const char* kForward = "qat::cpu_fused_soft_forward";
  static constexpr const char* kBackward = "qat::cpu_fused_soft_gradients";
  static bool takes(const Stack& inputs) {
    const Tensor& beta = inputs[3].toTensor();
    return beta.is_cpu() && beta.scalar_type() == at::kFloat;
  }
  static std::vector<c10::IValue> rest(Stack&, const Tensor&) { return {}; }
  static void run(Stack& stack, const Tensor&, bool) { forward<CpuSoft>(stack); }
};
struct Cuda {
  static constexpr const char* kForward = "qat::cuda_fused_forward";
  static constexpr const char* kBackward = "qat::cuda_fused_gradients";
  static bool takes(const Stack&) { return true; }
  static std::vector<c10::IValue> rest(Stack& inputs, const Tensor& w) {
    const c10::IValue bf16 = popped(inputs);
    return {w.size(1), inputs[3], inputs[5], bf16};  // K, the granularity and the number of groups
  }
  // Of a tensor that counts no versions nothing is known later.
  static void run(Stack& stack, const Tensor& x, bool kept) {
    const bool shares = kept && !x.is_inference();
    const Quantized::How how = {stack[8], stack[9], static_cast<at::ScalarType>(stack[10].toInt())};
    if (shares)
      Quantized::find(x, how, stack);
    else
      stack.insert(stack.end(), {c10::IValue(), c10::IValue(0), c10::IValue(0)});
    forward<Cuda>(stack);
    const int64_t capture = popped(stack).toInt(), stream = popped(stack).toInt();
    if (shares) Quantized::last().emplace(x, how, stack[1].toTensor(), stream, capture);
  }
};

template <class Ops>
torch::CppFunction boxed() {
  return torch::CppFunction::makeFromBoxedFunction<&call<Ops>>();
}

}  // namespace
}  // namespace qat::autograd

TORCH_LIBRARY_FRAGMENT(qat, m) {
  using namespace qat::autograd;
  m.def(
      "cpu_fused_linear(Tensor x, Tensor w, Tensor? bias, int rows, int groups, bool binary, float multiplier, float least,"
      " float most, int rounds_to, bool per_tensor, float eps, bool bf16) -> Tensor?",
      boxed<Cpu>());
  m.def(
      "cpu_fused_soft(Tensor x, Tensor w, Tensor? bias, Tensor beta, int rows, int groups, bool binary, float multiplier,"
      " float least, float most, int rounds_to, float eps) -> Tensor?",
      boxed<CpuSoft>());
  m.def(
      "cuda_fused_linear(Tensor x, Tensor w, Tensor? bias, int granularity, int reduce, int groups, bool binary, int scale_dtype,"
      " bool per_tensor, float eps, bool bf16) -> Tensor?",
      boxed<Cuda>());
}
