"""Outputs, gradients and updates of PEFT's DoRA, IA3 and LoRA+ on one small layer, and AdaLoRA on two, in float64.

    pip install torch 'peft>=0.20'
    python tests/data/make_adapters_golden.py      # writes tests/data/adapters_golden.safetensors
"""

import torch
from peft import AdaLoraConfig, IA3Config, LoraConfig, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from safetensors.torch import save_file

torch.manual_seed(0)
torch.set_default_dtype(torch.float64)
out = {}


class Net(torch.nn.Module):
    def __init__(self, weight, bias):
        super().__init__()
        self.proj = torch.nn.Linear(6, 4)
        self.config = {"model_type": "custom"}
        with torch.no_grad():
            self.proj.weight.copy_(weight)
            self.proj.bias.copy_(bias)

    def forward(self, x):
        return self.proj(x)


weight, bias = torch.randn(4, 6), torch.randn(4)
xs, up = torch.randn(2, 5, 6), torch.randn(2, 5, 4)
out |= {"weight": weight, "bias": bias, "xs": xs, "up": up}


def shake(model):
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * 0.3)


def record(label, model, names):
    """Records the parameters, the output and the gradients of sum(up * output), under this crate's parameter names."""
    params = {ours: p for ours, key in names.items() for n, p in model.named_parameters() if key in n}
    ys = model(xs)
    (ys * up).sum().backward()
    for ours, p in params.items():
        out[f"{label}.{ours}"] = p.detach().reshape(-1) if p.shape[-1] == 1 else p.detach().clone()
        out[f"{label}.{ours}.grad"] = p.grad.reshape(-1) if p.shape[-1] == 1 else p.grad.clone()
    out[f"{label}.ys"] = ys.detach()


dora = get_peft_model(Net(weight, bias), LoraConfig(r=3, lora_alpha=5, target_modules=["proj"], use_dora=True,
                                                    init_lora_weights=True)).double()
start = [p for n, p in dora.named_parameters() if "magnitude" in n][0]
out["dora.start"] = start.detach().clone()
shake(dora)
record("dora", dora, {"a": "lora_A", "b": "lora_B", "magnitude": "magnitude"})

for label, feed_forward in [("ia3", []), ("ia3_input", ["proj"])]:
    ia3 = get_peft_model(Net(weight, bias), IA3Config(target_modules=["proj"], feedforward_modules=feed_forward)).double()
    shake(ia3)
    params = [p for p in ia3.parameters() if p.requires_grad]
    ys = ia3(xs)
    (ys * up).sum().backward()
    out[f"{label}.scaling"], out[f"{label}.scaling.grad"] = params[0].detach().reshape(-1), params[0].grad.reshape(-1)
    out[f"{label}.ys"] = ys.detach()

# Ten SGD steps on two layers, each followed by an allocation: warm-up up to step 2, final budget from step 8 on.
TOTAL = 10


class Two(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = Net(weight, bias), torch.nn.Linear(4, 5, bias=False)
        self.config = {"model_type": "custom"}
        with torch.no_grad():
            self.second.weight.copy_(second)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


second, target = torch.randn(5, 4), torch.randn(2, 5, 5)
out |= {"second": second, "target": target}
config = AdaLoraConfig(init_r=4, target_r=2, tinit=2, tfinal=3, deltaT=1, total_step=TOTAL, lora_alpha=5,
                       target_modules=["proj", "second"], beta1=0.85, beta2=0.85, orth_reg_weight=0.5)
adalora = get_peft_model(Two(), config).double()
shake(adalora)
base = adalora.base_model
trained = {n: p for n, p in adalora.named_parameters() if p.requires_grad}
roles = {"lora_A": "a", "lora_B": "b", "lora_E": "values"}


def ours(name):
    layer = "second" if ".second." in name else "first.proj"
    return f"{layer}.default." + next(role for key, role in roles.items() if key in name)


def flat(p):
    return p.reshape(-1) if p.shape[-1] == 1 and p.dim() == 2 and p.shape[0] == 4 else p


for name, p in trained.items():
    out[f"adalora.start.{ours(name)}"] = flat(p.detach().clone()).contiguous()
for step in range(1, TOTAL + 1):
    adalora.zero_grad()
    loss = ((adalora(xs) - target) ** 2).mean()
    penalty = sum(torch.norm((p @ p.T if "lora_A" in n else p.T @ p) - torch.eye(4))
                  for n, p in trained.items() if "lora_A" in n or "lora_B" in n) / 4
    (loss + 0.5 * penalty).backward()
    if step == 1:
        out["adalora.loss"], out["adalora.penalty"] = loss.detach().reshape(1), penalty.detach().reshape(1)
        for name, p in trained.items():
            out[f"adalora.grad.{ours(name)}"] = flat(p.grad.clone()).contiguous()
    with torch.no_grad():
        for p in trained.values():
            p -= 0.05 * p.grad
    base.update_and_allocate(step)
    values = torch.cat([p.detach().reshape(-1) for n, p in sorted(trained.items()) if "lora_E" in n])
    out[f"adalora.values.{step}"] = values.clone()
print({k: [round(float(x), 3) for x in v] for k, v in out.items() if k.startswith("adalora.values")})

plus = get_peft_model(Net(weight, bias), LoraConfig(r=3, lora_alpha=5, target_modules=["proj"])).double()
shake(plus)
out |= {"plus.a": next(p for n, p in plus.named_parameters() if "lora_A" in n).detach().clone(),
        "plus.b": next(p for n, p in plus.named_parameters() if "lora_B" in n).detach().clone()}
optimizer = create_loraplus_optimizer(plus, torch.optim.AdamW, lr=1e-2, loraplus_lr_ratio=16.0,
                                      loraplus_weight_decay=0.1)
for _ in range(3):
    optimizer.zero_grad()
    (plus(xs) * up).sum().backward()
    optimizer.step()
out |= {"plus.after.a": next(p for n, p in plus.named_parameters() if "lora_A" in n).detach().clone(),
        "plus.after.b": next(p for n, p in plus.named_parameters() if "lora_B" in n).detach().clone()}

save_file({k: v.contiguous() for k, v in out.items()}, "tests/data/adapters_golden.safetensors")
