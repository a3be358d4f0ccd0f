// Gradient of the saliency mass, see basic/saliency_mass.cu. Here dx is the gradient of
// a loss with respect to x.
//
//   ds_i = dmass_i pi_i,   dpi_i = dmass_i (s_i - epsilon)
//
// One thread, one output.
// Shapes: all arrays (B, N), with B N elements.

extern "C" __global__ void saliency_mass_vjp(const real_t* gradient,
                                             const real_t* saliency,
                                             const real_t* probabilities,
                                             long long num_elements, double epsilon,
                                             real_t* by_saliency,
                                             real_t* by_probability) {
    const long long index = thread_index();  // (B, N)
    if (index >= num_elements) return;
    const acc_t slope = widen(gradient[index]);
    store(by_saliency + index, slope * widen(probabilities[index]));
    store(by_probability + index, slope * (widen(saliency[index]) - acc_t(epsilon)));
}
