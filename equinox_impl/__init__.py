"""The Transformer as Equinox modules over `core`. `nnx_impl` mirrors it file by file."""

from core.config import TransformerConfig
from equinox_impl.attention import MultiHeadAttention
from equinox_impl.blocks import DecoderBlock, EncoderBlock, FeedForward
from equinox_impl.decoding import beam_search, evaluation, generate, score
from equinox_impl.dispatch import compiled
from equinox_impl.layers import Dropout, Embedding, LayerNorm, Linear, PositionEmbedding, RMSNorm, Unembedding
from equinox_impl.relative import ShawPositions, T5Positions, TransformerXLPositions
from equinox_impl.scan import StackedBlocks
from equinox_impl.stacks import Decoder, Encoder
from equinox_impl.training import Trainer, eval_step, functional_step, init_transformer, loss_fn, train_step, update
from equinox_impl.transformer import Classifier, DecoderOnlyTransformer, EncoderOnlyTransformer, Transformer
from equinox_impl.weights import from_weights, to_weights

__all__ = [
    "Classifier",
    "Decoder",
    "DecoderBlock",
    "DecoderOnlyTransformer",
    "Dropout",
    "Embedding",
    "Encoder",
    "EncoderBlock",
    "EncoderOnlyTransformer",
    "FeedForward",
    "LayerNorm",
    "Linear",
    "MultiHeadAttention",
    "PositionEmbedding",
    "RMSNorm",
    "ShawPositions",
    "StackedBlocks",
    "T5Positions",
    "Trainer",
    "Transformer",
    "TransformerConfig",
    "TransformerXLPositions",
    "Unembedding",
    "beam_search",
    "compiled",
    "eval_step",
    "evaluation",
    "from_weights",
    "functional_step",
    "generate",
    "init_transformer",
    "loss_fn",
    "score",
    "to_weights",
    "train_step",
    "update",
]
