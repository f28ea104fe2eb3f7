"""The Transformer as Flax NNX modules over `core`. `equinox_impl` mirrors it file by file."""

from core.config import TransformerConfig
from nnx_impl.attention import MultiHeadAttention
from nnx_impl.blocks import DecoderBlock, EncoderBlock, FeedForward
from nnx_impl.decoding import beam_search, evaluation, generate, score
from nnx_impl.dispatch import compiled
from nnx_impl.layers import Dropout, Embedding, LayerNorm, Linear, PositionEmbedding, RMSNorm, Unembedding
from nnx_impl.relative import ShawPositions, T5Positions, TransformerXLPositions
from nnx_impl.scan import StackedBlocks
from nnx_impl.stacks import Decoder, Encoder
from nnx_impl.training import Trainer, eval_step, functional_step, init_transformer, loss_fn, train_step, update
from nnx_impl.transformer import Classifier, DecoderOnlyTransformer, EncoderOnlyTransformer, Transformer
from nnx_impl.weights import from_weights, to_weights

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
