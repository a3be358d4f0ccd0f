// Gradient of the attention mass, see basic/attention_mass.cu. Here dx is the gradient
// of a loss with respect to x.
//
//   dr_i = dm_i e^(-H_i) / (L H),   dH_i = -dm_i r_i e^(-H_i) / (L H)
//
// both times n_i if attention is causal. Every layer and head gets the same gradient;
// padding gets 0. One thread writes those of one token.
// Shapes: gradient and mask (B, N); all other arrays (L, B, H, N).
extern "C" __global__ void attention_mass_vjp(
    const real_t* gradient, const real_t* received, const real_t* entropy,
    const bool* mask, long long layers, long long batch, long long heads,
    long long num_tokens, long long causal, real_t* by_received, real_t* by_entropy) {
    const long long index = thread_index();  // (B, N)
    if (index >= batch * num_tokens) return;
    const long long b = index / num_tokens, i = index % num_tokens;
    const acc_t r = layer_mean(received, layers, batch, heads, num_tokens, b, i);
    const acc_t h = layer_mean(entropy, layers, batch, heads, num_tokens, b, i);
    const acc_t visible = causal ? tokens_up_to(mask, b * num_tokens, i) : acc_t(1);
    const bool valid = is_token(mask, index);
    const acc_t slope =
        valid ? widen(gradient[index]) * exp(-h) * visible / (layers * heads) : 0;
    for (long long l = 0; l < layers; ++l)
        for (long long head = 0; head < heads; ++head) {
            const long long element = ((l * batch + b) * heads + head) * num_tokens + i;
            store(by_received + element, slope);
            store(by_entropy + element, valid ? -slope * r : 0);
        }
}
