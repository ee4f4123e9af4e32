"""Fields of a config.json that are there for other reasons than what the model computes from a text.

The one list of them: conversion passes over these fields, and doctor does not name them. Sources: PretrainedConfig and
GenerationConfig of transformers 4 and 5, the configuration classes of the architectures here, published files.
"""

BOOKKEEPING = frozenset(
    """
    architectures auto_map bos_token bos_token_id cls_token_id dtype eos_token eos_token_id eos_token_ids
    finetuning_task ignore_index mask_token_id model_type name_or_path _name_or_path pad_token pad_token_id prefix
    reference sep_token_id task_specific_params tokenizer_class torch_dtype transformers_version transformers_weights
    unk_token_id _commit_hash _comment _from_model_config _pad_token_id base_model_name_or_path comment
    custom_pipelines description language library_name license model_name model_version pipeline_tag tags
    transformers.js_config version

    base_model_ep_plan base_model_pp_plan base_model_tp_plan cache_config cache_implementation chunk_size_feed_forward
    compile_config cross_attention_hidden_size device_map disable_compile distributed_config is_decoder is_llama_config
    keys_to_ignore_at_inference load_in_4bit load_in_8bit _load_in_4bit _load_in_8bit max_cache_len output_attentions
    output_hidden_states output_past output_router_logits prefill_chunk_size pretraining_tp return_dict
    return_dict_in_generate return_legacy_cache tf_legacy_loss tie_encoder_decoder torchscript tp_plan use_bfloat16
    use_cache use_return_dict

    attn_implementation _attn_implementation _attn_implementation_autoset _attn_implementation_internal
    _experts_implementation _flash_attn_2_enabled flash_attn flash_attention fused_bias_gelu fused_mlp
    fused_rotary_emb fused_cross_entropy use_flash_attention use_flash_attention_2 use_flash_attn use_flashattn
    use_fused_cross_entropy use_fused_mlp use_fused_rms_norm use_fused_rope use_grouped_mm use_liger_kernel
    use_triton use_xformers

    attention_dropout attention_dropout_prob attention_probs_dropout_prob attn_dropout attn_pdrop aux_loss_alpha
    bf16 classifier_dropout dropout embd_pdrop embedding_dropout embedding_initializer_range emb_dropout_prob fp16
    gradient_checkpointing gradient_checkpointing_use_reentrant hidden_dropout hidden_dropout_prob id2label
    init_device init_method init_std initializer_factor initializer_range label2id loss_type neftune_noise_alpha
    num_labels problem_type resid_pdrop router_aux_loss_coef router_z_loss_coef seq_aux summary_activation
    summary_first_dropout summary_proj_to_labels summary_type summary_use_proj unsloth_fixed unsloth_tiled_mlp
    unsloth_version use_unsloth_gradient_checkpointing

    assistant_confidence_threshold assistant_early_exit assistant_ensemble_weight assistant_lookbehind bad_words_ids
    begin_suppress_tokens constraints continuous_batching_config decoder_start_token_id diversity_penalty do_sample
    dola_layers early_stopping encoder_no_repeat_ngram_size encoder_repetition_penalty epsilon_cutoff eta_cutoff
    exponential_decay_length_penalty force_words_ids forced_bos_token_id forced_decoder_ids forced_eos_token_id
    generation_kwargs guidance_scale is_assistant length_penalty low_memory max_length max_matching_ngram_size
    max_new_tokens max_time min_length min_new_tokens min_p no_repeat_ngram_size num_assistant_tokens
    num_assistant_tokens_schedule num_beam_groups num_beams num_return_sequences output_logits output_scores
    penalty_alpha prompt_lookup_num_tokens remove_invalid_values renormalize_logits repetition_penalty sequence_bias
    speculation_type stop_strings suppress_tokens target_lookbehind temperature token_healing top_h top_k top_p
    typical_p use_mtp watermarking_config

    audio_token_id begin_image_token boi_token_index end_image_token eoi_token_index image_seq_length image_token_id
    image_token_index mm_tokens_per_image video_token_id video_token_index vision_end_token_id vision_start_token_id
    vision_token_id

    make_vocab_size_divisible_by max_seq_len max_seq_length max_sequence_length max_window_layers model_max_length
    n_ctx n_positions pad_to_multiple_of seq_length tokenizer_model_max_length tokenizer_padding_side
    training_sequence_length
    """.split()  # noqa: SIM905 (a list of that many lines)
)
"""In this order: names and ids; how transformers runs and what it returns; which kernels; training, its losses and
starts; generation; ids of images and films; lengths that other programs go by, and the
layers without a window where use_sliding_window, which is read, says that there is one."""
IMAGES_AND_SOUNDS = frozenset(
    """
    audio_config downsample_ratio image_grid_pinpoints multimodal_projector_bias perceiver_config
    pixel_shuffle_factor projector_config projector_hidden_act projector_layernorm_eps qformer_config scale_factor
    spatial_merge_size spatial_pool_mode spatial_pool_stride use_image_newline_parameter use_reentrant_checkpointing
    use_resampler video_seq_length vision_aspect_ratio vision_config vision_feature_layer vision_feature_layers
    vision_feature_select_strategy
    """.split()  # noqa: SIM905
)
"""Fields around a multimodal model's text_config that say what is done with the rest."""
QUANTIZATION = ("quantization_config", "quantization", "compression_config")
"""Fields that say how weights are quantized; without effect beside weights that are not."""
HARMLESS_SCALINGS = frozenset({"attn_factor", "finetuned", "mrope_section", "mrope_interleaved"})
"""Keys of a rotary scaling that transformers does not read (llama.cpp's and YaRN's own), or that turn a text's tokens
as without them: a text's three positions are one."""
