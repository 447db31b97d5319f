"""What a batch of CAMs costs, in forward passes: python tests/bench/cam_cost.py [--json PATH] [--arch resnet18] [--bs 64]

Plain forward (no gradient), the engine and pytorch-grad-cam's plain call take turns in one process, so that other load on
the machine meets them alike. The table has medians, and medians of the ratios of each round. `--arch vit-tiny-4` takes timm's ViT-Tiny
(vit_tiny.py): there the last block takes its turn too, forward and backward, since a map of a transformer costs a pass and what is behind the layer."""
from statistics import median

import torch
from pytorch_grad_cam import GradCAM

from cifar_cam.layers import cam_layer
from cifar_cam.cam import cam_maps
from cifar_cam.models import MODELS
from turns import keep, machine, options, ratio, take_turns

BEHIND = 'the last block and the head, forward and backward'


def as_map(t):
    "Tokens without the class token, N×C×H×W"
    side = int((t.shape[1] - 1)**.5)
    return t[:, 1:].reshape(len(t), side, side, -1).permute(0, 3, 1, 2)


def behind_layer(model, x):
    "A function that runs what is behind the target layer of timm's ViT, forward and backward, from the tokens before the last block"
    with torch.no_grad():
        kept = []
        handle = model.blocks[-1].register_forward_pre_hook(lambda module, args: kept.append(args[0].detach()))
        model(x)
        handle.remove()
    def run():
        t = kept[0].requires_grad_()
        logits = model.forward_head(model.norm(model.blocks[-1](t)))
        return torch.autograd.grad(logits.max(1).values.sum(), t)[0]
    return run


def measure(arch='resnet18', bs=64, size=32, rounds=15, methods=('gradcam', 'hirescam', 'layercam', 'eigencam'), device='cpu'):
    "One row for each contender: median seconds a batch, images a second, and the ratio to the plain forward pass"
    torch.manual_seed(0)
    device = torch.device(device)
    model,x = MODELS[arch]().eval().to(device),torch.randn(bs, 3, size, size, device=device)
    layer = cam_layer(model, size=(size, size))[1]
    def forward():
        with torch.no_grad(): return model(x)
    tokens = hasattr(model, 'blocks')
    def library():
        with GradCAM(model, [layer], reshape_transform=as_map if tokens else None) as cam: return torch.from_numpy(cam(x, None))
    runs = {'forward, no gradient': forward, 'pytorch-grad-cam gradcam': library}
    if tokens: runs[BEHIND] = behind_layer(model, x)
    for m in methods: runs[f'cam_maps {m}'] = lambda m=m: cam_maps(model, x, m, layer=layer).maps
    runs["cam_maps gradcam, layer='auto'"] = lambda: cam_maps(model, x).maps
    difference = (library() - runs['cam_maps gradcam']().cpu()).abs().max().item()
    times = take_turns(runs, rounds, device)
    extra = {}
    if tokens:
        both = [f + b for f,b in zip(times['forward, no gradient'], times[BEHIND])]
        extra['GradCAM ÷ forward pass and the last block'] = median(t/b for t,b in zip(times['cam_maps gradcam'], both))
    rows = [dict(run=n, seconds=median(t), images_per_s=bs/median(t), forwards=ratio(times, n, 'forward, no gradient')) for n,t in times.items()]
    return dict(benchmark='cam', arch=arch, bs=bs, size=size, rounds=rounds, **machine(device), rows=rows, max_abs_difference=difference,
                ratios={'GradCAM ÷ forward pass': ratio(times, 'cam_maps gradcam', 'forward, no gradient'), 'pytorch-grad-cam ÷ GradCAM': ratio(times, 'pytorch-grad-cam gradcam', 'cam_maps gradcam')} | extra)


def main():
    p = options(__doc__, bs=64, rounds=15, device='cpu')
    p.add_argument('--arch', default='resnet18')
    a = p.parse_args()
    if a.arch=='vit-tiny-4': import vit_tiny # registers it
    res = measure(a.arch, a.bs, rounds=a.rounds, device=a.device)
    print(f"{res['arch']}, {res['bs']} images of {res['size']}×{res['size']}, {res['device']}, {res['threads']} threads, "
          f"{res['rounds']} rounds\n{'run':32}{'s/batch':>9}{'images/s':>10}{'forwards':>10}")
    for r in res['rows']: print(f"{r['run']:32}{r['seconds']:9.3f}{r['images_per_s']:10.0f}{r['forwards']:10.2f}")
    for name,value in res['ratios'].items(): print(f'{name}: {value:.2f}')
    print(f"gradcam against the library's: {res['ratios']['pytorch-grad-cam ÷ GradCAM']:.2f} times as fast, largest difference {res['max_abs_difference']:.0e}")
    keep(res, a.json)


if __name__ == '__main__': main()
