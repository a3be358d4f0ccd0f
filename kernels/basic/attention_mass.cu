// Attention mass: the attention that a token receives, divided by the perplexity of its
// own attention.
//
//   m_i = r_i e^(-H_i)         or m_i = r_i n_i e^(-H_i) if attention is causal
//
// r is the attention received and H the entropy; both are means over layers and heads
// (`layer_mean` in head_mean.cuh). n_i is the number of tokens up to token i
// (`tokens_up_to`, there too). Padding has mass 0. One thread, one output.
// Shapes: received and entropy (L, B, H, N), mask and out (B, N).
extern "C" __global__ void attention_mass(const real_t* received, const real_t* entropy,
                                          const bool* mask, long long layers,
                                          long long batch, long long heads,
                                          long long num_tokens, long long causal,
                                          acc_t* out) {
    const long long index = thread_index();  // (B, N)
    if (index >= batch * num_tokens) return;
    const long long b = index / num_tokens, i = index % num_tokens;
    const acc_t r = layer_mean(received, layers, batch, heads, num_tokens, b, i);
    const acc_t h = layer_mean(entropy, layers, batch, heads, num_tokens, b, i);
    const acc_t visible = causal ? tokens_up_to(mask, b * num_tokens, i) : acc_t(1);
    out[index] = is_token(mask, index) ? r * exp(-h) * visible : 0;
}
