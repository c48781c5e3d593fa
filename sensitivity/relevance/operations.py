"""What kind of operation each torch function is, by its name, to relevance."""

from __future__ import annotations


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Linear in their differentiable operands, moving elements, or homogeneous of degree one
# (x f'(x) = f(x)): input times ordinary gradient conserves relevance.
PLAIN = _names("""
    get view view_as reshape reshape_as flatten unflatten ravel transpose t swapaxes swapdims
    permute movedim moveaxis squeeze unsqueeze expand expand_as broadcast_to broadcast_tensors
    repeat repeat_interleave tile contiguous clone to type type_as float double half bfloat16 cpu
    detach detach_ requires_grad requires_grad_ data alias getitem index_select gather take
    take_along_dim select narrow split split_with_sizes chunk tensor_split hsplit vsplit dsplit
    unbind unfold fold flip fliplr flipud roll rot90 tril triu diagonal diag diag_embed as_strided
    pixel_shuffle pixel_unshuffle channel_shuffle native_channel_shuffle pad interpolate upsample
    sum mean nansum cumsum neg negative positive diff trace mT mH T H real imag view_as_real
    view_as_complex conj resolve_conj resolve_neg
    fft_fft fft_ifft fft_rfft fft_irfft fft_fft2 fft_ifft2 fft_rfft2 fft_irfft2
    fft_fftn fft_ifftn fft_rfftn fft_irfftn fft_fftshift fft_ifftshift
    scatter scatter_add scatter_reduce index_add index_copy
    index_put masked_select masked_scatter copy zero avg_pool1d avg_pool2d
    avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d dropout dropout1d
    dropout2d dropout3d feature_dropout alpha_dropout
    abs absolute relu leaky_relu prelu rrelu norm vector_norm amax amin max min aminmax sort topk
    kthvalue median quantile cummax cummin std hypot
    max_pool1d max_pool2d max_pool3d max_pool1d_with_indices max_pool2d_with_indices
    max_pool3d_with_indices adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d
    lp_pool1d lp_pool2d nan_to_num register_hook retain_grad
    """)

# Functions of one element: relevance passes as it is, but for what f(0) absorbs.
ELEMENTWISE = _names("""
    gelu silu tanh sigmoid elu selu celu softplus mish hardswish hardsigmoid hardtanh relu6
    softsign logsigmoid log_sigmoid hardshrink softshrink tanhshrink threshold logit
    erf erfc exp exp2 expm1 log1p sin cos tan asin acos atan sinh cosh asinh acosh atanh
    arctan arcsinh arctanh sqrt pow float_power clamp clamp_min clamp_max clip log log2
    log10 lgamma digamma ceil floor round sinc
    """)

# Sums in which a constant may take part: it absorbs its own relevance. Where operands are.
ADDITIVE: dict[str, tuple[int, ...]] = {
    **dict.fromkeys(("add", "sub", "subtract", "maximum", "minimum", "fmax", "fmin"), (0, 1)),
    "where": (1, 2),
    "setitem": (2,),
    **dict.fromkeys(
        ("cat", "concat", "concatenate", "stack", "hstack", "vstack", "dstack", "column_stack"),
        (0,),
    ),
}
ADDITIVE_KEYWORDS = ("input", "other", "tensors")

# Products: where several operands are differentiable each gets an equal part.
PRODUCTS = _names(
    "mul multiply matmul rmatmul mm bmm mv dot vdot inner outer einsum tensordot kron"
)

# Quotients: the denominator is a constant.
QUOTIENTS = _names("div divide true_divide truediv")
SQUARES = frozenset(("square", "var"))  # of degree two: x f'(x) = 2 f(x)
SCALES = _names("rsqrt reciprocal rdiv rtruediv")  # of which nothing gets relevance

LAYERS = {
    "linear": "linear",
    "conv1d": "conv",
    "conv2d": "conv",
    "conv3d": "conv",
    "conv_transpose1d": "conv",
    "conv_transpose2d": "conv",
    "conv_transpose3d": "conv",
}

# Modules whose forward is a function of one element, written in several torch operations.
ELEMENTWISE_MODULES = ("transformers.activations",)
