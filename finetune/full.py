"""Fine-tune every weight of a model; it differs from lora.py in what is trained and in what is saved."""

from functools import partial
from pathlib import Path

from lit_sft.args import FullTrainArgs


def main(args: FullTrainArgs) -> None:
    """Train all weights on ``args.data_dir`` and save the model, a checkpoint_dir, to ``args.out_dir``/model."""
    from lit_sft import checkpoint, layout, optim, runtime
    from lit_sft.batches import TrainSteps, ValRows
    from lit_sft.fitting import choose_settings, make_plan, show_estimate
    from lit_sft.generate import sampler
    from lit_sft.loop import fit
    from lit_sft.prompts import PROMPT_FACTS
    from lit_sft.rehearsal import rehearse
    from lit_sft.run import Saver, can_share_prefix, check_shards, finish, open_run, resolve_args
    from lit_sft.shards import Shards
    from lit_sft.tokenizer import Tokenizer

    # the data, and whether they were made for this model
    train = Shards(args.data_dir, "train", args.max_seq_length)
    val = Shards(args.data_dir, "val", args.max_seq_length)
    checkpoint_dir = layout.check_checkpoint_dir(args.checkpoint_dir or train.manifest.facts["checkpoint_dir"])
    tokenizer = Tokenizer(checkpoint_dir)
    check_shards(train, val, tokenizer, checkpoint_dir)
    layout.copied_files(checkpoint_dir)  # into the result: what is wrong with them is said now

    # which examples make each step, on this process
    fabric = runtime.launch(args)
    share = can_share_prefix(args, checkpoint_dir, train)
    plan = make_plan(args, checkpoint_dir, train, fabric.device.type, runtime.precision(fabric))
    if args.estimate:
        return show_estimate(plan)
    given, args = args, runtime.on_first(fabric, lambda: choose_settings(args, plan))
    train_steps = TrainSteps(train, args, fabric.world_size, fabric.global_rank, share)
    share = can_share_prefix(args, checkpoint_dir, val)
    val_batches = ValRows(val, train_steps.row_tokens, fabric.world_size, fabric.global_rank, share)
    args = resolve_args(args, checkpoint_dir, fabric, train_steps)

    with open_run(given, args, train_steps, fabric) as state:
        # the model, all of it trained; 16-bit weights get fp32 masters
        model = checkpoint.load_model(checkpoint_dir, dtype=runtime.base_dtype(fabric), device=fabric.device)
        model.checkpoint_every = args.checkpoint_every
        if args.compile:
            model.compile_blocks()
        trained = optim.master_parameters(model)
        optimizer = optim.build_optimizer(model, trained, args)
        save = Saver(fabric, args, layout.TRAINED_WEIGHTS, trained, optimizer, {})
        done = save.restore(state)
        optim.publish(trained, model)

        # whether the longest row fits, then the loop
        if args.rehearse if args.rehearse is not None else fabric.device.type != "cpu":
            rehearse(fabric, model, trained, optimizer, train_steps, args, plan, done)
        sample = sampler(
            model, tokenizer, args.sample_prompt, val if len(val) else train, partial(runtime.autocast, fabric)
        )
        lr_at = optim.lr_schedule(args, train_steps.max_steps)
        last = fit(
            fabric, model, optimizer, lr_at, train_steps, val_batches, args, save, sample, None, done, plan.advice
        )

        # the result
        if fabric.is_global_zero:
            model_dir = Path(args.out_dir) / layout.MODEL_DIR
            facts = {name: train.manifest.facts.get(name) for name in PROMPT_FACTS}
            checkpoint.save_model(model_dir, model, checkpoint_dir, facts)
            finish(args, last, model_dir, save)


if __name__ == "__main__":
    from lit_sft.cli import run  # here: training needs no parser of arguments

    run(main)
