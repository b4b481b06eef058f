// The entries of LoRA with a router's gates from the dispatcher: one launch where a tile holds the logits too, else the
// router's and then those of LoRA with gates.
#include "mixture/mixture.h"

#include "gated/gated_call.h"
#include "registration.h"
#include "router/router_call.h"

namespace adamix {
namespace {

// What either entry does with its arguments, once they are checked.
struct MixtureCall {
  RouterCall routing;
  GatedCall gated;

  MixtureCall(const Tensor& x, const Tensor& lora_a, const Tensor& lora_b, const Tensor& router,
              const OptionalTensor& base, const OptionalTensor& seed, int64_t top_k, double scaling, int64_t groups,
              const std::vector<int64_t>& offsets, double dropout_p)
      : routing("router", checked(x, lora_a, lora_b, router), router, std::nullopt, top_k),
        gated(gated_lora_call(x, lora_a, lora_b, ids_of(lora_a), ids_of(lora_b), routing.gates, std::nullopt, "base",
                              base, seed, scaling, groups, offsets, dropout_p, "outputs")) {}

  // x, of which LoRA and the router ask different things.
  static const Tensor& checked(const Tensor& x, const Tensor& lora_a, const Tensor& lora_b, const Tensor& router) {
    check_sizes("x", x, "[B, S, K]", {-1, -1, -1});
    check_sizes("lora_a", lora_a, "[Ma, groups * r, K]", {-1, -1, -1});
    check_sizes("lora_b", lora_b, "[Mb, groups * Ng, r]", {-1, -1, -1});
    check_sizes("router", router, "[M, K]", {-1, x.size(2)});
    int64_t most = std::max(lora_a.size(0), lora_b.size(0)), fewest = std::min(lora_a.size(0), lora_b.size(0));
    if (router.size(0) != most || (fewest != most && fewest != 1)) {
      fail("router", shape_text(router),
           "[M, K] for banks of M experts, one of which may hold a single one: got " + shape_text(lora_a) + " and " +
               shape_text(lora_b));
    }
    return x;
  }
  OptionalTensor ids_of(const Tensor& bank) const {
    return routing.top_k > 0 && bank.size(0) > 1 ? OptionalTensor(routing.index) : std::nullopt;
  }

  // Fills out, which may be base itself, and what is returned beside it; returns t.
  Tensor run(const OptionalTensor& base, const Tensor& out) {
    Device device = check_device("x", gated.x);
    GatedRows rows(gated, base, out);
    if (!run_in_one(device, rows)) {
      DeviceScope scope(device);
      routing.run(device);
      run_gated_forward(gated, device, rows);
    }
    return rows.t;
  }

  bool run_in_one(const Device& device, const GatedRows& rows) {
    bool done = false;
    DeviceScope scope(device);
    Tensor router = as_contiguous(routing.weight);
    dispatch(gated.dtype, [&](auto type) {
      using T = typename decltype(type)::type;
      if constexpr (sizeof(T) == 2) {
        MixtureForward<T> params{};
        fill<T>(params, gated, rows);
        params.router = router.data_ptr();
        params.gate_values = data<float>(routing.gates);
        params.ids = routing.top_k > 0 ? data<int64_t>(routing.index) : nullptr;
        params.logits = data<float>(routing.logits);
        params.routed = routing.experts;
        params.wide = routing.wide;
        done = launch_mixture_forward_mma(params, device);
      }
    });
    return done;
  }
};

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> mixture_lora_forward(
    Tensor x, Tensor lora_a, Tensor lora_b, Tensor router, OptionalTensor base, OptionalTensor seed, int64_t top_k,
    double scaling, int64_t groups, std::vector<int64_t> offsets, double dropout_p) {
  MixtureCall call(x, lora_a, lora_b, router, base, seed, top_k, scaling, groups, offsets, dropout_p);
  check_device("x", x);
  Tensor out = allocate(x, {call.gated.batch, call.gated.tokens, call.gated.width});
  Tensor t = call.run(base, out);
  return {out, t, call.routing.gates, call.routing.index, call.routing.logits};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> mixture_lora_forward_inplace(Tensor x, Tensor lora_a, Tensor lora_b,
                                                                        Tensor router, Tensor base, OptionalTensor seed,
                                                                        int64_t top_k, double scaling, int64_t groups,
                                                                        std::vector<int64_t> offsets,
                                                                        double dropout_p) {
  MixtureCall call(x, lora_a, lora_b, router, base, seed, top_k, scaling, groups, offsets, dropout_p);
  if (!base.is_contiguous()) fail("base", "a tensor that is not contiguous", "a contiguous one to be overwritten");
  call.gated.ranges.gaps = 0;
  Tensor t = call.run(base, base);
  return {t, call.routing.gates, call.routing.index, call.routing.logits};
}

}  // namespace adamix
