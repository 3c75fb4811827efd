"""Golden values of Hugging Face PEFT's MonteCLoRA, with every random number that PEFT drew.

    python make_peft_golden.py [--out FOLDER]     (default: this script's folder)

Writes peft_monteclora_golden.safetensors and peft_monteclora_golden.json. PEFT's own classes compute everything: a
model of LoRA layers from `get_peft_model`, in float64. While a sampler fills its buffer, `torch.randn` and
`Chi2.rsample` are wrapped to record the float32 numbers that they return, which are stored exactly. Outputs are rounded
to float32 at the end. The script checks that the same model in float32 agrees within 2e-5 of each tensor's largest
entry.

What PEFT (0.21.2) computes, in PEFT's order. r = rank, n = in_features, N = num_samples, rho = std_prior [r],
c = expert_weights_prior [N], eps = sample_scaler, eta = kl_loss_weight, b = dirichlet_prior.

  Buffer (filled when the layer is created, and again when it is used up; D = buffer_size draws):
    Z = randn(D, N, n, r), g = randn(D, N), then for each draw a Wishart_r(I, df = r) matrix by Bartlett:
    T lower triangular, T_ii = max(sqrt(chi2(r - i)), float32 epsilon), i = 0..r-1; T_ij (i > j) = randn, filled row
    by row ((1,0), (2,0), (2,1), (3,0), ...); W = T T^T. W is drawn in float32.
  Forward in training, with the next draw of the buffer:
    1. Covariance. Sigma = diag(v), v_i = max(exp(rho_i)^2 W_ii, 1e-3): W's off-diagonals have no effect;
       W_ii = T_ii^2 + sum_{j<i} T_ij^2. A clipped entry has no gradient.
       The buffer `gaussian_var_prior` becomes Sigma [r, r], attached to the graph.
    2. Noise of component k: noise_k[i, o] = eps Z[k, i, o] sqrt(v_o), shape [n, r]; the square root is a Cholesky
       factor computed in float32 for every dtype. NaN becomes 1e-3 before eps. `sampler()` returns noise [N, n, r], pi.
    3. Weights. a = max(exp(c), 1e-6); mu_k = ln a_k - mean(ln a);
       s_k = max((1 - 2/N) / a_k + sum_j(1/a_j) / N^2, 1e-6) + 1e-6 (clamp first, then a jitter of 1e-6);
       pi = softmax(mu_k + sqrt(s_k) g_k). The square root is in float32 here too. Every term has a gradient to c.
       The buffer `expert_weights` becomes pi.
    4. A_eff = sum_k pi_k (A + noise_k^T). Since sum pi = 1 this is A + sum_k pi_k noise_k^T (eps applied once).
    5. y = W0 x + b0 + (alpha / r) B A_eff dropout(x). If a noise or pi is NaN, A itself is used, with a warning.
  Regulariser of a layer in training (0 in evaluation), from the state after the last forward
  (before any forward: gaussian_var_prior = I, expert_weights = 1/N):
    kl_dirichlet = ln[G(sum a) / G(N b)] + sum_k ln[G(a_k) / G(b)] + sum_k (a_k - b)(psi(a_k) - psi(sum a)), here
      a = exp(c) without a clamp, G = exp(lgamma) (overflows float32 beyond an argument of about 35). The second
      term has the opposite sign of the true divergence's.
    kl_wishart = 1/2 (-r sum_i 2 rho_i + r sum_i exp(2 rho_i) - r^2)
    kl_gaussian = N/2 (sum_i v_i - sum_i ln v_i - r), v the clipped diagonal of step 1 (a further clamp at 1e-6 has
      no effect on it), gradient to rho through v
    entropy = sum_k pi_k^2 with use_entropy, else 0
    layer loss = eta (kl_dirichlet + kl_wishart + kl_gaussian) + entropy
  `LoraModel._get_monteclora_loss()` = sum of the layer losses / number of MonteCLoRA layers; the trainer mixin adds it
  to the task's loss with weight 1.

Keys, C = case (`a`: r 4, n 10, out 6, N 3, two layers q and v, entropy on; `b`: r 8, n 16, out 5, N 8, one layer q,
entropy off; the JSON file has the other settings), L = layer, D = draw index 0 or 1:
  C/x [5, n], C/L/target [5, out]      input of every layer; weight of y in the task loss
  C/L/W0 [out, n], C/L/b0 [out], C/L/A [r, n], C/L/B [out, r], C/L/std_prior [r], C/L/expert_weights_prior [N]
  C/L/D/z_mvn [N, n, r]       standard normals Z
  C/L/D/z_dirichlet [N]       standard normals g
  C/L/D/chi2 [r]              chi2(r - i) draws
  C/L/D/z_tril [r(r-1)/2]     standard normals below T's diagonal, row by row
  C/L/D/wishart [r, r]        W as PEFT computes it
  C/L/D/var [r]               v           C/L/D/noise [N, n, r]     noise of step 2
  C/L/D/weights [N]           pi          C/L/D/A_eff [r, n]        the matrix that multiplies x
  C/L/D/delta [r, n]          A_eff - A   C/L/D/y [5, out]
  C/L/D/{kl_dirichlet,kl_wishart,kl_gaussian,entropy,layer_loss}   [1]; entropy also where use_entropy is off
  C/D/regulariser [1], C/D/task [1]                 `_get_monteclora_loss()`; sum over layers of sum(target * y)
  C/L/D/{regulariser,task}.grad.{std_prior,expert_weights_prior}   gradients of each of the two
  C/L/D/task.grad.{A,B}
  C/before/regulariser [1]    before the first forward
In both draws of every layer, one variance is clipped: that of the strongly negative std_prior entry.

Needs torch, peft >= 0.20, safetensors.
"""
import argparse
import json
import os

import torch
from peft import LoraConfig, MontecloraConfig, get_peft_model
from peft import __version__ as peft_version
from peft.tuners.lora import variants
from safetensors.torch import save_file
from torch import nn
from torch.distributions.chi2 import Chi2

HERE = os.path.dirname(os.path.abspath(__file__))
DRAWS = 2
CASES = {
    "a": {
        "r": 4, "in_features": 10, "out_features": 6, "layers": ["q", "v"], "lora_alpha": 6, "num_samples": 3,
        "use_entropy": True, "dirichlet_prior": 0.7, "sample_scaler": 0.05, "kl_loss_weight": 0.03, "seed": 11,
    },
    "b": {
        "r": 8, "in_features": 16, "out_features": 5, "layers": ["q"], "lora_alpha": 16, "num_samples": 8,
        "use_entropy": False, "dirichlet_prior": 0.1, "sample_scaler": 0.005, "kl_loss_weight": 1e-5, "seed": 12,
    },
}


class Toy(nn.Module):
    def __init__(self, case):
        super().__init__()
        for name in case["layers"]:
            self.add_module(name, nn.Linear(case["in_features"], case["out_features"]))

    def forward(self, x):
        return [layer(x) for layer in self.children()]


class Recorder:
    """Records the results of `torch.randn` and `Chi2.rsample`, in the order of the calls."""

    def __enter__(self):
        self.calls, self.randn, self.rsample = [], torch.randn, Chi2.rsample

        def keep(value):
            assert value.dtype == torch.float32
            self.calls.append(value.detach().clone())
            return value

        torch.randn = lambda *args, **kwargs: keep(self.randn(*args, **kwargs))
        Chi2.rsample = lambda chi2, *args, **kwargs: keep(self.rsample(chi2, *args, **kwargs))
        return self

    def __exit__(self, *_):
        torch.randn, Chi2.rsample = self.randn, self.rsample

    def draws(self):
        """Splits the calls into draws: z_mvn and z_dirichlet come in bulk, then chi2 and z_tril draw by draw."""
        z_mvn, z_dirichlet, *bartlett = self.calls
        assert len(bartlett) == 2 * DRAWS
        return [
            {"z_mvn": z_mvn[d], "z_dirichlet": z_dirichlet[d], "chi2": bartlett[2 * d], "z_tril": bartlett[2 * d + 1]}
            for d in range(DRAWS)
        ]


class EffectiveA:
    """Records every matrix that is passed to `F.linear`, among them PEFT's effective A."""

    def __enter__(self):
        self.seen, self.linear = [], variants.F.linear

        def linear(x, weight, bias=None):
            self.seen.append(weight)
            return self.linear(x, weight, bias)

        variants.F.linear = linear
        return self

    def __exit__(self, *_):
        variants.F.linear = self.linear


def build(case):
    config = LoraConfig(
        r=case["r"], lora_alpha=case["lora_alpha"], target_modules=case["layers"],
        monteclora_config=MontecloraConfig(
            num_samples=case["num_samples"], use_entropy=case["use_entropy"],
            dirichlet_prior=case["dirichlet_prior"], sample_scaler=case["sample_scaler"],
            kl_loss_weight=case["kl_loss_weight"], buffer_size=DRAWS,
        ),
    )
    return get_peft_model(Toy(case), config)


def parts(model, name):
    layer = getattr(model.base_model.model, name)
    sampler = layer.lora_monteclora_sampler["default"]
    return {
        "W0": layer.base_layer.weight, "b0": layer.base_layer.bias,
        "A": layer.lora_A["default"].weight, "B": layer.lora_B["default"].weight,
        "std_prior": sampler.std_prior, "expert_weights_prior": sampler.expert_weights_prior,
    }, sampler


def parameters(case, generator):
    """Returns random parameters. The variance of the last rank is below PEFT's clip of 1e-3."""
    def normal(*shape, std=1.0):
        return std * torch.randn(*shape, generator=generator)

    r, n, out, components = (case[k] for k in ("r", "in_features", "out_features", "num_samples"))
    rho = normal(r, std=0.5)
    rho[-1] = -5.5
    return {
        "W0": normal(out, n, std=0.3), "b0": normal(out, std=0.3), "A": normal(r, n, std=0.3),
        "B": normal(out, r, std=0.3), "std_prior": rho, "expert_weights_prior": normal(components, std=0.6),
    }


def run(name, case, dtype):
    generator = torch.Generator().manual_seed(case["seed"])
    torch.manual_seed(100 + case["seed"])
    model = build(case).to(dtype).train()
    tensors = {f"{name}/x": torch.randn(5, case["in_features"], generator=generator)}
    samplers, values, noise = {}, {}, {}
    for layer in case["layers"]:
        given = parameters(case, generator)
        given["target"] = torch.randn(5, case["out_features"], generator=generator)
        tensors |= {f"{name}/{layer}/{k}": v for k, v in given.items()}
        values[layer], samplers[layer] = parts(model, layer)
        with torch.no_grad():
            for k, p in values[layer].items():
                p.copy_(given[k])
                p.requires_grad_(k not in ("W0", "b0"))
        sampler = samplers[layer]
        sampler.dtype = torch.float32  # draws are made in float32; the forward casts them to the parameters' dtype
        with Recorder() as recorder:
            sampler.sampler._refill_buffer()
        noise[layer] = recorder.draws()
    x = tensors[f"{name}/x"].to(dtype)
    tensors[f"{name}/before/regulariser"] = model.base_model._get_monteclora_loss()

    def gradients(scalar, what, d, wanted):
        for layer in case["layers"]:
            found = torch.autograd.grad(scalar, [values[layer][k] for k in wanted], retain_graph=True)
            tensors.update({f"{name}/{layer}/{d}/{what}.grad.{k}": g for k, g in zip(wanted, found)})

    for d in range(DRAWS):
        with EffectiveA() as effective:
            outputs = model(x)
        shape = (case["r"], case["in_features"])
        a_effs = [w for w in effective.seen if tuple(w.shape) == shape]
        assert len(a_effs) == len(case["layers"])
        task = 0
        for layer, y, a_eff in zip(case["layers"], outputs, a_effs):
            at, s, given = f"{name}/{layer}/{d}", samplers[layer], values[layer]
            tensors |= {f"{at}/{k}": v for k, v in noise[layer][d].items()}
            sample = s.sampler.buffer[d]
            variance = s.gaussian_var_prior
            kl = {
                "kl_dirichlet": s.dirichlet_kl(torch.exp(s.expert_weights_prior)),
                "kl_wishart": s.wishart_kl(torch.diag(torch.exp(s.std_prior))),
                "kl_gaussian": s.multivariate_kl(variance),
            }
            kl_sum, entropy = s.get_variational_loss()
            torch.testing.assert_close(kl_sum, case["kl_loss_weight"] * sum(kl.values()))
            tensors |= {f"{at}/{k}": v for k, v in kl.items()}
            tensors |= {
                f"{at}/wishart": sample["z_wishart"], f"{at}/var": variance.diag(),
                f"{at}/weights": s.expert_weights, f"{at}/A_eff": a_eff, f"{at}/delta": a_eff - given["A"],
                f"{at}/noise": s.multivariate_reparameterization(sample["z_mvn"].to(dtype), variance),
                f"{at}/y": y, f"{at}/entropy": (s.expert_weights**2).sum(),
                f"{at}/layer_loss": kl_sum + entropy,
            }
            task = task + (tensors[f"{name}/{layer}/target"].to(dtype) * y).sum()
        regulariser = model.base_model._get_monteclora_loss()
        tensors |= {f"{name}/{d}/regulariser": regulariser, f"{name}/{d}/task": task}
        gradients(regulariser, "regulariser", d, ["std_prior", "expert_weights_prior"])
        gradients(task, "task", d, ["std_prior", "expert_weights_prior", "A", "B"])
    return {k: v.detach().reshape(v.shape or (1,)) for k, v in tensors.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default=HERE)
    out = parser.parse_args().out
    torch.set_num_threads(1)
    tensors = {}
    for name, case in CASES.items():
        exact, single = run(name, case, torch.float64), run(name, case, torch.float32)
        for key, value in exact.items():
            error = (value - single[key]).abs().max() / value.abs().max().clamp(min=1e-9)
            assert error < 2e-5, (key, error)
        tensors |= exact
    tensors = {k: v.float().contiguous() for k, v in sorted(tensors.items())}
    save_file(tensors, f"{out}/peft_monteclora_golden.safetensors")
    with open(f"{out}/peft_monteclora_golden.json", "w") as f:
        json.dump({"peft_version": peft_version, "draws": DRAWS, "cases": CASES}, f, indent=2)
        f.write("\n")


if __name__ == "__main__":
    main()
