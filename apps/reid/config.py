"""Every knob of reid: type, default and one sentence; flags, help and YAML keys are views of these fields."""

from dataclasses import dataclass, field

from shared.config import knob


@dataclass(frozen=True)
class DataConfig:
    data_path: str | None = knob(None, "Folder, table or pack with images of people; none: demo data.")
    format: str = knob(
        "auto",
        "How to read it; auto looks at the files.",
        choices=("auto", "orbench", "tree", "market", "csv", "pack"),
    )
    modalities: tuple[str, ...] = knob(
        ("rgb", "nir", "cp", "sk", "text"), "Modalities to use of those the data has; rgb is the gallery's."
    )
    height: int | None = knob(None, "Height that images are seen in (pixels); none: the pack's, or 256.", minimum=16)
    width: int | None = knob(None, "Width that images are seen in (pixels); none: the pack's, or 128.", minimum=16)
    val_share: float = knob(
        0.2,
        "Share of the identities to train on that validate instead, where the source names none; 0 validates on none.",
        minimum=0.0,
        below=1.0,
    )
    vocab: str | None = knob(
        None, "CLIP's byte-pair vocabulary, bpe_simple_vocab_16e6.txt.gz; none: captions are read as bytes."
    )
    max_tokens: int = knob(0, "Longest caption (tokens); 0: 77 with a vocabulary, 160 bytes without.", minimum=0)


@dataclass(frozen=True)
class ModelConfig:
    embed_dim: int = knob(64, "Width of features, which both towers share.", minimum=1)
    tower_width: int = knob(64, "Width of the image tower.", minimum=1)
    tower_layers: int = knob(2, "Blocks of the image tower.", minimum=1)
    tower_heads: int = knob(4, "Attention heads of the image tower; they share the width.", minimum=1)
    patch: int = knob(8, "Side of a patch (pixels); height and width are multiples of it.", minimum=1)
    text_width: int = knob(64, "Width of the text tower.", minimum=1)
    text_layers: int = knob(1, "Blocks of the text tower.", minimum=1)
    text_heads: int = knob(4, "Attention heads of the text tower.", minimum=1)
    rank: int = knob(4, "Rank of each image modality's experts in every block; 0 has none.", minimum=0)
    alpha: float = knob(1.0, "Experts are multiplied by alpha / rank.", above=0.0)
    drop_path: float = knob(
        0.0, "Probability to skip the image tower's last block; it rises linearly to it.", minimum=0.0, below=1.0
    )
    fusion: str = knob(
        "pooled",
        "What is fused where a query has several modalities: their features, or all their tokens.",
        choices=("pooled", "tokens"),
    )
    fusion_layers: int = knob(1, "Blocks of the fusion.", minimum=1)
    fusion_heads: int = knob(4, "Attention heads of the fusion.", minimum=1)
    dropout: float = knob(
        0.0, "Share of normalised feature values dropped before the classifier.", minimum=0.0, below=1.0
    )
    grad_checkpoint: bool = knob(False, "Recompute blocks in backward: less memory, a slower step.")


@dataclass(frozen=True)
class TrainConfig:
    epochs: int = knob(40, "Passes; see --epoch-length.", minimum=1)
    identities_per_batch: int = knob(8, "Identities of a batch (P).", minimum=2)
    num_instances: int = knob(
        4, "Samples of each identity in a batch (K); their caption and draws are their own.", minimum=1
    )
    epoch_length: str = knob(
        "samples", "Passes end when every sample was drawn (samples), every identity (identities), or after N batches."
    )
    ensure_rgb: bool = knob(True, "Each identity of a batch that has both shows RGB and another modality.")
    prefer_complete: str = knob(
        "first",
        "Identities with RGB and another modality come first, they alone are used (only), or it does not matter (any).",
        choices=("any", "first", "only"),
    )
    accumulate: int = knob(
        1, "Batches of P x K whose gradients make one step; each batch's losses stay its own.", minimum=1
    )
    subsets: str = knob(
        "all",
        "What RGB is matched with: every subset of the other modalities, or each of them alone.",
        choices=("all", "single"),
    )
    id_weight: float = knob(1.0, "Weight of the identity cross-entropy.", minimum=0.0)
    label_smoothing: float = knob(0.1, "Share of the identity target spread over all classes.", minimum=0.0, below=1.0)
    sdm_weight: float = knob(
        0.3, "Weight of similarity distribution matching between RGB and each subset.", minimum=0.0
    )
    sdm_form: str = knob(
        "kl", "kl: divergence in both directions (IRRA); ce: cross-entropy with those of the same identity.",
        choices=("kl", "ce"),
    )  # fmt: skip
    temperature: float = knob(0.05, "Temperature of the similarities in sdm.", minimum=1e-4)
    triplet_weight: float = knob(1.0, "Weight of the triplet loss with the hardest pairs.", minimum=0.0)
    triplet_margin: float = knob(0.0, "Its margin; 0 is the soft margin.", minimum=0.0)
    circle_weight: float = knob(0.0, "Weight of the pairwise circle loss.", minimum=0.0)
    circle_margin: float = knob(0.25, "Its margin.", minimum=0.0, maximum=1.0)
    circle_scale: float = knob(64.0, "Its scale.", above=0.0)
    modality_dropout: float = knob(
        0.0, "Probability that a sample's modality other than RGB is left out of a step.", minimum=0.0, below=1.0
    )
    flip: float = knob(0.5, "Probability to mirror an image.", minimum=0.0, maximum=1.0)
    pad: int = knob(2, "Pixels around an image that a crop may reach into, beside the pack's margin.", minimum=0)
    erase: float = knob(0.0, "Probability to erase a rectangle.", minimum=0.0, maximum=1.0)
    optimizer: str = knob("adamw", "adam or adamw, fused.", choices=("adam", "adamw"))
    lr: float = knob(3e-3, "Peak learning rate of fusion, neck and classifier.", minimum=0.0)
    tower_lr: float = knob(
        1.0, "Learning rate of the towers' shared weights, in multiples of --lr; 0 freezes them.", minimum=0.0
    )
    expert_lr: float = knob(
        1.0, "Learning rate of patches, experts and null tokens, in multiples of --lr.", minimum=0.0
    )
    layer_decay: float = knob(
        1.0, "Factor on a tower's learning rate per block below the last.", above=0.0, maximum=1.0
    )
    weight_decay: float = knob(
        0.01, "Decoupled weight decay (adamw); L2 term under adam; none on norms and biases.", minimum=0.0
    )
    lr_scheduler: str = knob("cosine", "Learning rate after warm-up.", choices=("constant", "cosine", "step"))
    warmup_steps: int = knob(50, "Linear warm-up (steps).", minimum=0)
    min_lr: float = knob(0.01, "Where cosine ends, as a share of the peak.", minimum=0.0, maximum=1.0)
    lr_step_epochs: int = knob(10, "Epochs between decays of the step schedule.", minimum=1)
    lr_gamma: float = knob(0.5, "Factor of each decay of the step schedule.", minimum=0.0, maximum=1.0)
    clip: str = knob(
        "adaptive",
        "Gradients are clipped to a quantile of the last norms, to --clip-norm, or not at all.",
        choices=("adaptive", "fixed", "off"),
    )
    clip_norm: float = knob(
        1.0, "Largest gradient norm under --clip fixed, and under adaptive until it knows enough.", above=0.0
    )
    clip_window: int = knob(100, "Norms that adaptive clipping remembers (steps).", minimum=2)
    clip_quantile: float = knob(
        0.7, "Their quantile that adaptive clipping multiplies by 1.15.", minimum=0.0, maximum=1.0
    )
    clip_low: float = knob(0.5, "Lower limit of adaptive clipping.", above=0.0)
    clip_high: float = knob(3.0, "Upper limit of adaptive clipping.", above=0.0)
    ema_decay: float = knob(
        0.0, "Decay per step of averaged weights used for evaluation; 0 keeps none.", minimum=0.0, maximum=1.0
    )
    init: str | None = knob(None, "CLIP weights to start from, Hugging Face's layout or OpenAI's (.safetensors, .pt).")
    seed: int = knob(42, "Seed of everything drawn.", minimum=0)
    precision: str = knob(
        "auto", "fp32, bf16, fp16, or auto: what this hardware is built for.", choices=("auto", "fp32", "bf16", "fp16")
    )
    device: str = knob("auto", "auto, cpu, cuda or cuda:N.")
    compile: str = knob(
        "off",
        "Mode of torch.compile.",
        choices=("off", "default", "reduce-overhead", "max-autotune"),
    )
    cudnn_benchmark: bool = knob(False, "Let cuDNN time its kernels; the towers have no convolution, so nothing gains.")
    deterministic: bool = knob(False, "Only deterministic kernels, an error where there is none; slower on CUDA.")
    num_workers: int = knob(
        0, "Processes that make batches; 0: a thread, which is faster from packs (workers are for JPEG).", minimum=0
    )
    prefetch: int = knob(
        0, "Batches made ahead, by a thread or by each worker; 0: as fits the device, none on a CPU.", minimum=0
    )
    start_method: str = knob(
        "auto", "How workers start: fork, spawn, or auto (the platform's).", choices=("auto", "fork", "spawn")
    )
    windows: bool = knob(
        False, "The notes' settings for Windows: at most 2 workers that stay, 1 batch ahead, started afresh."
    )
    select: str = knob("MM/mAP", "Validation metric that picks the best checkpoint and stops early.")
    ks: tuple[int, ...] = knob((1, 5, 10), "Ranks at which a hit counts (R1, R5, R10).")
    camera_rule: str = knob(
        "auto",
        "Gallery images of the query's person and camera do not count (on), count (off), or as the data's rule has it.",
        choices=("auto", "on", "off"),
    )
    rerank: bool = knob(False, "Also re-rank with k-reciprocal neighbours (test only).")
    rerank_k1: int = knob(20, "Neighbours of re-ranking.", minimum=1)
    rerank_k2: int = knob(6, "Neighbours that re-ranking averages over.", minimum=1)
    rerank_lambda: float = knob(0.3, "Share of the plain distance in re-ranking.", minimum=0.0, maximum=1.0)
    eval_every: int = knob(10, "Epochs between validations.", minimum=1)
    patience: int = knob(0, "Validations without improvement before stopping early; 0 never stops early.", minimum=0)
    log_every: int = knob(100, "Steps between lines of metrics.jsonl.", minimum=1)
    norm_every: int = knob(200, "Steps between records of norms; 0 records none.", minimum=0)
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
    "num_epoch": "epochs",
    "num_epochs": "epochs",
    "learning_rate": "lr",
    "accumulation_steps": "accumulate",
    "gradient_accumulation_steps": "accumulate",
    "data_dir": "data_path",
    "data_root": "data_path",
    "sampler_seed": "seed",
    "prefetch_factor": "prefetch",
    "instances_per_id": "num_instances",
}
