"""Every knob of seqrec: type, default and one sentence; flags, help and YAML keys are views of these fields."""

from dataclasses import dataclass, field

from shared.config import knob


@dataclass(frozen=True)
class DataConfig:
    data_path: str | None = knob(None, "File or folder with sequences, or a pack made by `prepare`; none: demo data.")
    format: str = knob(
        "auto", "How to read it; auto looks at the file.", choices=("auto", "pairs", "lines", "inter", "pack")
    )
    max_len: int = knob(50, "Most recent events of a history the model sees (events).", minimum=1)
    split: str = knob(
        "leave-one-out",
        "What is held out: each user's last two events, whole users, or the latest events.",
        choices=("leave-one-out", "user", "time"),
    )
    held_out_share: float = knob(
        0.1, "Share of users or events that the splits user and time hold out.", above=0.0, maximum=0.9
    )
    window: str = knob(
        "last",
        "Which part of a longer history trains: the last, a random one each epoch, or all in pieces.",
        choices=("last", "random", "all"),
    )
    layout: str = knob(
        "auto",
        "Sequences in rows: packed (several per row) or padded; auto is packed on CPU, padded on CUDA.",
        choices=("auto", "packed", "padded"),
    )


@dataclass(frozen=True)
class ModelConfig:
    embed_dim: int = knob(64, "Width of embeddings and blocks.", minimum=1)
    num_blocks: int = knob(2, "Blocks.", minimum=0)
    num_heads: int = knob(2, "Attention heads; they share the width.", minimum=1)
    dropout: float = knob(
        0.2, "Share of values dropped after embeddings, attention and feed-forward.", minimum=0.0, maximum=0.9
    )
    norm_first: bool = knob(True, "LayerNorm before each sublayer (pre-norm) instead of after the addition.")
    attention: str = knob(
        "softmax", "softmax (SASRec) or hstu (pointwise, gated, relative bias).", choices=("softmax", "hstu")
    )
    ffn: str = knob("gelu", "Feed-forward layer of softmax blocks.", choices=("gelu", "swiglu"))
    ffn_mult: int = knob(4, "Width of the feed-forward layer in multiples of embed_dim.", minimum=1)
    position: str = knob(
        "learned",
        "Positions: learned (counted back from the last event), rope, or none.",
        choices=("learned", "rope", "none"),
    )
    features: bool = knob(True, "Use features and embeddings of items and users, where the data has them.")
    embeddings: tuple[str, ...] = knob(("all",), "Families of item embeddings to use, or all.")
    user_token: bool = knob(True, "Begin every sequence with a token of the user's profile, where the data has it.")
    action_input: bool = knob(True, "Tell the model what was done at each event, where the data says it.")
    time_input: bool = knob(False, "Tell the model pauses, time of day and of the week, where the data has times.")
    next_action: bool = knob(
        True, "Ask for the next item given what will be done with it (see --query-action), where the data says it."
    )
    query_time: bool = knob(
        False, "Tell the model when the next item is asked for; in tests that is the target's own time, so it leaks."
    )
    score: str = knob("dot", "Score of an item: dot product, or cosine over temperature.", choices=("dot", "cosine"))
    temperature: float = knob(0.05, "Temperature of cosine scores.", minimum=1e-4)
    grad_checkpoint: bool = knob(False, "Recompute blocks in backward: less memory, a slower step.")


@dataclass(frozen=True)
class TrainConfig:
    epochs: int = knob(10, "Passes over the training pieces.", minimum=1)
    batch_size: int = knob(128, "Sequences per optimizer step.", minimum=1)
    accumulate: int = knob(
        1, "Micro-batches a step is split into: less memory, the same result but for dropout's draws.", minimum=1
    )
    loss: str = knob(
        "ce",
        "ce (full catalogue), sampled (softmax over shared negatives), inbatch, bce (one negative), gbce.",
        choices=("ce", "sampled", "inbatch", "bce", "gbce"),
    )
    num_negatives: int = knob(512, "Negatives that all positions of a step share (sampled, gbce).", minimum=1)
    negatives: str = knob("uniform", "How shared negatives are drawn.", choices=("uniform", "popularity"))
    logq: bool = knob(True, "Correct sampled and in-batch logits by the log of each item's sampling rate.")
    gbce_t: float = knob(
        0.75, "Calibration of gbce: 0 is plain BCE, 1 is like a full softmax.", minimum=0.0, maximum=1.0
    )
    optimizer: str = knob(
        "adam",
        "adam, adamw, or muon for the blocks' matrices with adamw for the rest.",
        choices=("adam", "adamw", "muon"),
    )
    lr: float = knob(1e-3, "Peak learning rate.", minimum=0.0)
    muon_lr: float = knob(0.02, "Peak learning rate of the matrices under muon.", minimum=0.0)
    weight_decay: float = knob(0.0, "Decoupled weight decay (adamw, muon); L2 term under adam.", minimum=0.0)
    lr_scheduler: str = knob("cosine", "Learning rate after warm-up.", choices=("constant", "cosine", "step"))
    warmup_steps: int = knob(0, "Linear warm-up (steps).", minimum=0)
    min_lr: float = knob(0.0, "Where cosine ends, as a share of the peak.", minimum=0.0, maximum=1.0)
    lr_step_epochs: int = knob(10, "Epochs between decays of the step schedule.", minimum=1)
    lr_gamma: float = knob(0.5, "Factor of each decay of the step schedule.", minimum=0.0, maximum=1.0)
    clip_norm: float = knob(1.0, "Largest gradient norm; 0 does not clip.", minimum=0.0)
    ema_decay: float = knob(
        0.0, "Decay per step of averaged weights used for evaluation; 0 keeps none.", minimum=0.0, maximum=1.0
    )
    seed: int = knob(42, "Seed of everything drawn.", minimum=0)
    precision: str = knob(
        "auto", "fp32, bf16, fp16, or auto: what this hardware is built for.", choices=("auto", "fp32", "bf16", "fp16")
    )
    device: str = knob("auto", "auto, cpu, cuda or cuda:N.")
    compile: str = knob(
        "off",
        "Mode of torch.compile; no gain on a CPU.",
        choices=("off", "default", "reduce-overhead", "max-autotune"),
    )
    action_weights: tuple[float, ...] = knob(
        (1.0, 1.0, 1.0), "Weight in the loss of targets that were shown, clicked and converted."
    )
    query_action: str = knob(
        "click", "What predictions ask for under --next-action.", choices=("exposure", "click", "conversion")
    )
    select: str = knob("NDCG@10", "Validation metric that picks the best checkpoint and stops early.")
    ks: tuple[int, ...] = knob((1, 5, 10, 50), "Cut-offs of the ranking metrics.")
    protocol: str = knob(
        "filtered",
        "Ranking protocol of all metrics: filtered (history left out), unfiltered, or sampled (100 negatives).",
        choices=("filtered", "unfiltered", "sampled"),
    )
    eval_every: int = knob(1, "Epochs between validations.", minimum=1)
    patience: int = knob(0, "Validations without improvement before stopping early; 0 never stops early.", minimum=0)
    log_every: int = knob(50, "Steps between lines of metrics.jsonl.", minimum=1)
    norm_every: int = knob(200, "Steps between records of the gradient norm; 0 records none.", minimum=0)
    save_every: int = knob(0, "Steps between checkpoints; 0 saves at the end of each epoch.", minimum=0)
    keep: int = knob(2, "Most recent checkpoints kept beside the best.", minimum=1)
    max_steps: int = knob(0, "Stop after so many optimizer steps; 0 runs all epochs.", minimum=0)
    memory_mib: int = knob(32, "Memory for a chunk of scores in evaluation and prediction (MiB).", minimum=1)
    tensorboard: bool = knob(False, "Also write TensorBoard event files (needs the extra `board`).")


@dataclass(frozen=True)
class Config:
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    training: TrainConfig = field(default_factory=TrainConfig)


# spellings of the original scripts -> ours; in flags (as --num-epochs) and in YAML (as num_epochs)
ALIASES = {
    "num_epochs": "epochs",
    "num_epoch": "epochs",
    "hidden_units": "embed_dim",
    "dropout_rate": "dropout",
    "learning_rate": "lr",
    "l_r": "lr",
    "maxlen": "max_len",
    "gradient_checkpointing": "grad_checkpoint",
    "data_dir": "data_path",
    "accumulation_steps": "accumulate",
}
