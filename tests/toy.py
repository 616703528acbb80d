"""The smallest training script, on noise: tests of what all scripts share run it as they run the others."""

import torch

import common


def get_parser():
    parser = common.build_parser(__doc__)
    number, whole = common.positive(float), common.positive(int)
    for name, kind, default in (
        ("samples", whole, 30),
        ("epochs", whole, 3),
        ("img_size", whole, 32),
        ("batch_size_per_gpu", whole, 4),
        ("accum_steps", whole, 1),
        ("lr", number, 0.1),
        ("num_workers", common.not_negative(int), 0),
        ("weight_decay", number, 0.1),
        ("optimizer", str, "sgd"),
    ):
        parser.add_argument(f"--{name}", type=kind, default=default)
    parser.add_argument("--bad", type=int, nargs="*", default=[], help="samples that cannot be read")
    parser.set_defaults(mean=(0, 0, 0), std=(1, 1, 1))
    common.add_run_flags(parser)
    return parser


class Noise(torch.utils.data.Dataset):
    def __init__(self, args):
        self.args = args

    def __len__(self):
        return self.args.samples

    def __getitem__(self, key):
        if key[1] in self.args.bad:
            raise common.UnreadableImageError(f"file {key[1]}: bad")
        return torch.rand(
            3, self.args.img_size, self.args.img_size, generator=common.generator(self.args.seed, *key)
        )


def train(args, process, more_terms=lambda run, step: {}, **more):
    """`more_terms(run, step)` is called in each step; `more` goes to Run.steps."""
    run = common.Run(args, process, args.samples, args.samples, common.FREE_FLAGS | {"bad"})
    torch.manual_seed(args.seed)
    model = common.build_backbone("test_resnet", args.img_size)
    optimizer = common.build_optimizer(model, args)
    run.restore(model, model=model, optimizer=optimizer)
    network = common.distributed(model, process)
    for step in run.steps(run.loader(Noise(args)), **{"init": "from scratch", **more}):
        common.set_lr(optimizer, args.lr / (1 + step))
        terms = []
        for micro in range(args.accum_steps):
            images = run.fetch()
            with common.accumulating(network, micro, args.accum_steps):
                loss = network(images).square().mean()
                (loss / args.accum_steps).backward()
            terms.append({"loss": loss.detach(), "all": torch.stack([loss.detach(), torch.tensor(1.0)])})
        if step == 0:
            run.draw("views.png", [images[:2]])
        norm = common.grad_norm(optimizer, run.scaler)
        common.optimizer_step(optimizer, run.scaler)
        terms = common.mean_terms(terms) | {"grad_norm": norm} | more_terms(run, step)
        run.end_step(step, terms, lr=args.lr / (1 + step))
    return run


def main():
    args = get_parser().parse_args()
    process = common.init_process(args.device)
    train(args, process)
    process.leave()


if __name__ == "__main__":
    main()
