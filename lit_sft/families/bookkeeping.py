"""Fields of a config.json that are there for other reasons than what the model computes from a text."""

BOOKKEEPING = frozenset(
    """
    architectures auto_map bos_token bos_token_id cls_token_id dtype eos_token eos_token_id finetuning_task
    mask_token_id model_type name_or_path _name_or_path pad_token pad_token_id prefix reference sep_token_id
    task_specific_params tokenizer_class torch_dtype transformers_version transformers_weights unk_token_id
    _commit_hash transformers.js_config

    cache_config cache_implementation chunk_size_feed_forward cross_attention_hidden_size is_decoder is_llama_config
    output_attentions output_hidden_states output_past output_router_logits pruned_heads return_dict
    return_dict_in_generate tf_legacy_loss tie_encoder_decoder torchscript use_bfloat16 use_cache use_return_dict

    attn_implementation _attn_implementation _attn_implementation_autoset _attn_implementation_internal
    _experts_implementation _flash_attn_2_enabled flash_attn flash_attention fused_bias_gelu fused_mlp
    fused_rotary_emb fused_cross_entropy pretraining_tp use_flash_attention use_flash_attention_2 use_flash_attn
    use_grouped_mm use_triton

    attention_dropout attention_dropout_prob attention_probs_dropout_prob attn_pdrop aux_loss_alpha classifier_dropout
    embd_pdrop embedding_dropout embedding_initializer_range emb_dropout_prob gradient_checkpointing
    gradient_checkpointing_use_reentrant hidden_dropout hidden_dropout_prob id2label initializer_factor
    initializer_range label2id loss_type neftune_noise_alpha num_labels problem_type resid_pdrop router_aux_loss_coef
    seq_aux summary_activation summary_first_dropout summary_proj_to_labels summary_type summary_use_proj
    unsloth_fixed unsloth_tiled_mlp unsloth_version use_unsloth_gradient_checkpointing

    bad_words_ids begin_suppress_tokens decoder_start_token_id diversity_penalty do_sample early_stopping
    encoder_no_repeat_ngram_size exponential_decay_length_penalty forced_bos_token_id forced_eos_token_id
    length_penalty max_length max_new_tokens min_length no_repeat_ngram_size num_beam_groups num_beams
    num_return_sequences output_scores remove_invalid_values repetition_penalty suppress_tokens temperature top_k top_p
    typical_p

    begin_image_token end_image_token boi_token_index eoi_token_index image_seq_length image_token_id image_token_index
    mm_tokens_per_image video_token_id video_token_index vision_end_token_id vision_start_token_id vision_token_id

    max_window_layers model_max_length max_sequence_length seq_length tokenizer_model_max_length tokenizer_padding_side
    """.split()  # noqa: SIM905 (a list of that many lines)
)
"""In this order: names and ids; how transformers runs and what it returns; which kernels; training, its losses and
starts; generation; ids of images and films; lengths that other programs go by, and the
layers without a window where use_sliding_window, which is read, says that there is one."""
HARMLESS_SCALINGS = frozenset({"attn_factor", "finetuned", "mrope_section", "mrope_interleaved"})
"""Keys of a rotary scaling that transformers does not read (llama.cpp's and YaRN's own), or that turn a text's tokens
as without them: a text's three positions are one."""
