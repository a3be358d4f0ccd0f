// Saliency mass: the weight of each token in the merged tokens.
//
//   mass_i = pi_i s_i + (1 - pi_i) epsilon
//
// pi is the probability that the Gumbel softmax gives the token, and s its saliency.
// epsilon is the mass of a token of probability 0. One thread, one output.
// Shapes: all arrays (B, N), with B N elements.

extern "C" __global__ void saliency_mass(const real_t* saliency,
                                         const acc_t* probabilities,
                                         long long num_elements, double epsilon,
                                         acc_t* out) {
    const long long index = thread_index();  // (B, N)
    if (index >= num_elements) return;
    const acc_t p = probabilities[index];
    out[index] = p * widen(saliency[index]) + (1 - p) * acc_t(epsilon);
}
