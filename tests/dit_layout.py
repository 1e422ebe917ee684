"""Names and shapes of the tensors in a file of DiT's weights, and diffusers' model of them."""

import warnings

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from diffusers import DiTTransformer2DModel


def dit_layout(width, depth, classes, rows, channels=4, patch=2):
    """The shape of each tensor by its name."""
    out = {
        "pos_embed": (1, rows * rows, width),
        "x_embedder.proj.weight": (width, channels, patch, patch),
        "x_embedder.proj.bias": (width,),
        "t_embedder.mlp.0.weight": (width, 256),
        "t_embedder.mlp.0.bias": (width,),
        "t_embedder.mlp.2.weight": (width, width),
        "t_embedder.mlp.2.bias": (width,),
        "y_embedder.embedding_table.weight": (classes + 1, width),
        "final_layer.linear.weight": (patch * patch * 2 * channels, width),
        "final_layer.linear.bias": (patch * patch * 2 * channels,),
        "final_layer.adaLN_modulation.1.weight": (2 * width, width),
        "final_layer.adaLN_modulation.1.bias": (2 * width,),
    }
    for i in range(depth):
        for name, shape in {
            "attn.qkv": (3 * width, width),
            "attn.proj": (width, width),
            "mlp.fc1": (4 * width, width),
            "mlp.fc2": (width, 4 * width),
            "adaLN_modulation.1": (6 * width, width),
        }.items():
            out[f"blocks.{i}.{name}.weight"], out[f"blocks.{i}.{name}.bias"] = shape, shape[:1]
    return out


def in_diffusers(w, heads):
    """The same weights in diffusers' model, mapped here by hand."""
    width, depth = len(w["x_embedder.proj.bias"]), sum(name.endswith("attn.qkv.bias") for name in w)
    outputs, classes = len(w["final_layer.linear.bias"]) // 4, len(w["y_embedder.embedding_table.weight"]) - 1
    model = DiTTransformer2DModel(
        num_attention_heads=heads, attention_head_dim=width // heads, in_channels=4, out_channels=outputs,
        num_layers=depth, sample_size=8, patch_size=2, num_embeds_ada_norm=classes, norm_eps=1e-6,
    )  # fmt: skip
    state = {"pos_embed.proj.weight": w["x_embedder.proj.weight"], "pos_embed.proj.bias": w["x_embedder.proj.bias"]}
    for kind in ("weight", "bias"):
        state[f"proj_out_1.{kind}"] = w[f"final_layer.adaLN_modulation.1.{kind}"]
        state[f"proj_out_2.{kind}"] = w[f"final_layer.linear.{kind}"]
    for i in range(depth):
        a, b = f"transformer_blocks.{i}", f"blocks.{i}"
        embedding = f"{a}.norm1.emb.class_embedder.embedding_table.weight"
        state[embedding] = w["y_embedder.embedding_table.weight"]
        for kind in ("weight", "bias"):
            state[f"{a}.norm1.emb.timestep_embedder.linear_1.{kind}"] = w[f"t_embedder.mlp.0.{kind}"]
            state[f"{a}.norm1.emb.timestep_embedder.linear_2.{kind}"] = w[f"t_embedder.mlp.2.{kind}"]
            state[f"{a}.norm1.linear.{kind}"] = w[f"{b}.adaLN_modulation.1.{kind}"]
            for j, name in enumerate("qkv"):
                part = w[f"{b}.attn.qkv.{kind}"][j * width : (j + 1) * width]
                state[f"{a}.attn1.to_{name}.{kind}"] = part
            state[f"{a}.attn1.to_out.0.{kind}"] = w[f"{b}.attn.proj.{kind}"]
            state[f"{a}.ff.net.0.proj.{kind}"] = w[f"{b}.mlp.fc1.{kind}"]
            state[f"{a}.ff.net.2.{kind}"] = w[f"{b}.mlp.fc2.{kind}"]
    model.load_state_dict(state)
    for block in model.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 0  # DiT's own frequencies; diffusers' differ by a hair
    return model.eval()
