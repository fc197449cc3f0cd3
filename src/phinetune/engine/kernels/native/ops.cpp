// torch.ops.phinetune: the kernels of phinetune.engine.kernels on a CPU. They write into tensors that the caller made.
// Built by build.py.
#include "attend.h"
#include "attend_backward.h"
#include "cross_entropy.h"
#include "few_rows.h"
#include "kept_memory.h"
#include "low_rank.h"
#include "norm.h"
#include "rotary.h"
#include "swiglu.h"

STABLE_TORCH_LIBRARY(phinetune, m) {
  m.def("rms_norm(Tensor x, Tensor? residual, Tensor weight, float eps, Tensor(a!) out, Tensor(b!) scale, "
        "Tensor(c!)? total) -> ()");
  m.def("rms_norm_backward(Tensor grad, Tensor x, Tensor weight, Tensor scale, Tensor? beside, Tensor(a!) dx) -> ()");
  m.def("swiglu(Tensor gate_up, Tensor(a!) out) -> ()");
  m.def("swiglu_backward(Tensor grad, Tensor gate_up, Tensor(a!) out) -> ()");
  m.def("rotate_(Tensor(a!) states, Tensor cos, Tensor sin, float sign) -> ()");
  m.def("cross_entropy_(Tensor(a!) logits, Tensor labels, Tensor? weights, Tensor(b!) log_probs, Tensor(c!) first) "
        "-> ()");
  m.def("attend(Tensor qkv, Tensor segments, int heads, int kv_heads, int size, float scaling, int window, "
        "Tensor(a!) out, Tensor(b!)? log_sums) -> ()");
  m.def("attend_backward(Tensor grad, Tensor qkv, Tensor segments, int heads, int kv_heads, int size, float scaling, "
        "int window, Tensor out, Tensor log_sums, Tensor(a!) d_qkv) -> ()");
  m.def("few_rows(Tensor x, Tensor weight, Tensor(a!) out) -> ()");
  m.def("few_rows_of_half(Tensor x, Tensor weight, Tensor(a!) out) -> ()");
  m.def("few_rows_of_q8(Tensor x, Tensor weight, Tensor scales, Tensor(a!) out) -> ()");
  m.def("expand_q8(Tensor(a!) out, Tensor weight, Tensor scales) -> ()");
  m.def("add_low_rank_(Tensor(a!) out, Tensor x, Tensor[] a, Tensor[] b, float[] scalings, int[] starts, int[] stops) "
        "-> ()");
  m.def("multiplies_bfloat16() -> bool");
  m.def("keep_memory(bool on) -> bool");
  m.def("spread(Tensor logits, Tensor labels, Tensor log_probs, Tensor(a!) entropy, Tensor(b!) mean) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(phinetune, CPU, m) {
  m.impl("rms_norm", TORCH_BOX(&phinetune::rms_norm));
  m.impl("rms_norm_backward", TORCH_BOX(&phinetune::rms_norm_backward));
  m.impl("swiglu", TORCH_BOX(&phinetune::swiglu));
  m.impl("swiglu_backward", TORCH_BOX(&phinetune::swiglu_backward));
  m.impl("rotate_", TORCH_BOX(&phinetune::rotate_));
  m.impl("cross_entropy_", TORCH_BOX(&phinetune::cross_entropy_));
  m.impl("attend", TORCH_BOX(&phinetune::attend));
  m.impl("attend_backward", TORCH_BOX(&phinetune::attend_backward));
  m.impl("add_low_rank_", TORCH_BOX(&phinetune::add_low_rank_));
  m.impl("few_rows", TORCH_BOX(&phinetune::few_rows));
  m.impl("few_rows_of_half", TORCH_BOX(&phinetune::few_rows));
  m.impl("few_rows_of_q8", TORCH_BOX(&phinetune::few_rows_of_q8));
  m.impl("expand_q8", TORCH_BOX(&phinetune::expand_q8));
  m.impl("spread", TORCH_BOX(&phinetune::spread));
}

STABLE_TORCH_LIBRARY_IMPL(phinetune, CompositeExplicitAutograd, m) {
  m.impl("multiplies_bfloat16", TORCH_BOX(&phinetune::multiplies_bfloat16));
  m.impl("keep_memory", TORCH_BOX(&phinetune::keep_memory));
}
