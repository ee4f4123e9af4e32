#!/bin/sh
# The whole road on a tiny model, without network: make a checkpoint, convert it, prepare a CSV, train LoRA, ask before
# and after. Every command is printed as it can be typed (with .venv/bin on the PATH).
set -eu
cd "$(dirname "$0")/.."
question="What food do llamas eat?"

run() {
    printf '\n$'
    for word in "$@"; do
        case $word in *[!A-Za-z0-9_./=-]*) printf ' "%s"' "$word" ;; *) printf ' %s' "$word" ;; esac
    done
    printf '\n'
    "$@"
}

rm -rf out/demo data/demo # so that the demo can be run again
run python demo/make_checkpoint.py --checkpoint_dir checkpoints/demo/tiny-llama
run python scripts/convert_hf_checkpoint.py --checkpoint_dir demo/tiny-llama
run python scripts/prepare_csv.py --csv_path demo/instructions.csv --checkpoint_dir demo/tiny-llama \
    --destination_path data/demo --val_split_fraction 0.05
echo
echo "Before training the model has random weights and knows nothing:"
run python scripts/generate.py --checkpoint_dir demo/tiny-llama --prompt_style alpaca --prompt "$question" \
    --max_new_tokens 24
run python finetune/lora.py --data_dir data/demo --out_dir out/demo --epochs 24 --global_batch_size 16 \
    --learning_rate 3e-3 --eval_interval 100 --save_interval 100 --sample_prompt "$question"
echo
echo "After training it answers as the CSV does. (Val loss rose: a random base learns by heart and understands nothing.)"
run python scripts/generate.py --adapter_dir out/demo/adapter --prompt "$question" --temperature 0
grep "^$question" demo/instructions.csv
echo
echo "To type commands yourself: source .venv/bin/activate"
