"""Fine-tune a model with LoRA: the base stays frozen, small matrices beside its linear layers learn.

Read main from top to bottom: data, steps, model, adapter, optimizer, loop, result. An interrupted run goes
on with the same command.
"""

from functools import partial
from pathlib import Path

from lit_sft.args import LoRATrainArgs


def main(args: LoRATrainArgs) -> None:
    """Train an adapter on ``args.data_dir`` and save it to ``args.out_dir``/adapter."""
    from lit_sft import checkpoint, layout, optim, runtime
    from lit_sft.batches import TrainSteps, ValRows
    from lit_sft.experts import group_experts
    from lit_sft.fitting import choose_settings, make_plan, show_estimate
    from lit_sft.generate import sampler
    from lit_sft.joined import join_products
    from lit_sft.loop import fit
    from lit_sft.lora import apply_lora
    from lit_sft.offload import stream_blocks
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
        # the frozen base and the adapter that is trained beside it
        dtype = runtime.base_dtype(fabric)
        model = checkpoint.load_model(checkpoint_dir, None, dtype, fabric.device, args.quantize, args.offload)
        model.checkpoint_every = args.checkpoint_every
        dropout = apply_lora(model, args, args.seed)
        if args.init_from and state is None:
            checkpoint.init_adapter(model, args, checkpoint_dir)
        if fabric.device.type == "cuda" and not runtime.is_mixed(fabric):
            join_products(model)
        if not runtime.is_mixed(fabric) and not args.offload:
            group_experts(model)
        if args.offload:
            stream_blocks(model)  # each block's weights come to the device when it is computed
        if args.compile:
            model.compile_blocks()
        trained = optim.master_parameters(model)
        optimizer = optim.build_optimizer(model, trained, args)

        # where an interrupted run goes on; each saved state is an adapter too
        facts = checkpoint.adapter_facts(checkpoint_dir, train.manifest.facts)
        config = {layout.ADAPTER_CONFIG: checkpoint.adapter_json(args, facts)}
        save = Saver(fabric, args, layout.ADAPTER_WEIGHTS, trained, optimizer, config)
        done = save.restore(state)

        # whether the longest row fits, then the loop
        if args.rehearse if args.rehearse is not None else fabric.device.type != "cpu":
            rehearse(fabric, model, trained, optimizer, train_steps, args, plan, done, dropout)
        sample = sampler(
            model, tokenizer, args.sample_prompt, val if len(val) else train, partial(runtime.autocast, fabric)
        )
        lr_at = optim.lr_schedule(args, train_steps.max_steps)
        last = fit(
            fabric, model, optimizer, lr_at, train_steps, val_batches, args, save, sample, dropout, done, plan.advice
        )

        # the result
        if fabric.is_global_zero:
            adapter_dir = Path(args.out_dir) / layout.ADAPTER_DIR
            checkpoint.save_adapter(adapter_dir, model, args, facts)
            finish(args, last, adapter_dir, save)


if __name__ == "__main__":
    from lit_sft.cli import run  # here: training needs no parser of arguments

    run(main)
