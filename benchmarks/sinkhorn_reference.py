"""The gradient that an unrolled float64 log-domain Sinkhorn loop has in the limit of many iterations.

Used by sinkhorn.py. Near a permutation the loop needs millions of iterations, too many to keep for autograd. Its
fixed point is unique, so that Newton steps between the iterations may lead there; and there every iteration has the
same Jacobian, so that the gradients of 1, 2, 4, ... 2**60 unrolled iterations follow by squaring it. Two other routes
to the same gradient say how far to trust it: autograd through a loop from zero potentials, where that converges, and
a least-squares solve of the optimality conditions.
"""

import torch

DOUBLINGS = 60
UNROLLED = 400


def iterate(scaled, f):
    g = -(scaled + f[:, None]).logsumexp(0)
    return -(scaled + g).logsumexp(1), g


def newton_step(plan):
    """Return the step of both potentials for a plan whose columns sum to one, by its row sums: the dual's Newton direction."""
    rows = plan.sum(1)
    links = (plan / plan.sum(0)) @ plan.mT
    links.fill_diagonal_(0)
    laplacian = links.sum(1).diag() - links
    # Weighing the constant vector by the mean degree leaves the system regular, and its solution as it was.
    laplacian += laplacian.diagonal().mean() / len(plan)
    return torch.linalg.solve(laplacian, 1 - rows)


def converge(scaled, limit=3000):
    """Return the plan, the largest error of a marginal, and the iterations that were run."""
    f = -scaled.logsumexp(1)
    best = (float("inf"), f)
    for iteration in range(1, limit + 1):
        old = f
        f, g = iterate(scaled, f)
        plan = (scaled + old[:, None] + g).exp()
        error = max((plan.sum(1) - 1).abs().max().item(), (plan.sum(0) - 1).abs().max().item())
        best = min(best, (error, old), key=lambda found: found[0])
        if error < 1e-14:
            break
        step = newton_step(plan)
        if step.isfinite().all() and iteration > 10:
            f = old + step * min(1.0, 1.0 / step.abs().max().item())
    f, g = iterate(scaled, best[1])
    plan = (scaled + best[1][:, None] + g).exp()
    return plan, best[0], iteration


def contraction(plan):
    """Return how much of the error a late iteration leaves: the second eigenvalue of its Jacobian."""
    by_row, by_column = plan / plan.sum(1, keepdim=True), plan / plan.sum(0)
    return torch.linalg.svdvals((by_row * by_column).sqrt())[1].item() ** 2


def gradient_of_the_limit(plan, upstream, regularization):
    """Sum the unrolled iterations' part of the gradient by doubling; the marginals are those that the plan has."""
    largest = plan.argmax(1, keepdim=True)
    by_row, by_column = plan / plan.sum(1, keepdim=True), plan / plan.sum(0)
    # Adding to a row of the upstream gradient changes nothing, and counting from the largest entry loses no digits near a permutation.
    centred = upstream - upstream.gather(1, largest)
    weighed = plan * centred
    adjoint = weighed.sum(0) - by_row.mT @ weighed.sum(1)
    jacobian = by_row.mT @ by_column
    # The constant potential, which moves nothing, is the one direction that the iterations do not contract.
    jacobian -= plan.sum(0)[:, None] / plan.sum()
    total = adjoint
    for _ in range(DOUBLINGS):
        total = total + jacobian @ total
        jacobian = jacobian @ jacobian
    centred = centred - total
    centred = centred - centred.gather(1, largest)
    return plan * (centred - (by_row * centred).sum(1, keepdim=True)) / regularization


def gradient_by_autograd(logits, upstream, regularization):
    """Unroll the loop from zero potentials; None where it has not converged."""
    leaf = logits.clone().requires_grad_()
    scaled = leaf / regularization
    f = torch.zeros_like(scaled[0])
    for _ in range(UNROLLED):
        old = f
        f, g = iterate(scaled, f)
    if (f - old).abs().max() > 1e-13:
        return None
    return torch.autograd.grad((scaled + f[:, None] + g).exp(), leaf, upstream)[0]


def gradient_by_least_squares(plan, upstream, regularization):
    weighed = plan * (upstream - upstream.gather(1, plan.argmax(1, keepdim=True)))
    n = len(plan)
    system = torch.cat(
        (torch.cat((plan.sum(1).diag(), plan), 1), torch.cat((plan.mT, plan.sum(0).diag()), 1)),
    )
    sums = torch.cat((weighed.sum(1), weighed.sum(0)))
    solution = torch.linalg.lstsq(system, sums[:, None], driver="gelsd").solution[:, 0]
    return (weighed - plan * (solution[:n, None] + solution[n:])) / regularization


def relative_error(gradient, reference):
    return ((gradient.double() - reference).norm() / reference.norm()).item()


def reference(logits, upstream, regularization):
    """Return the gradient in float64, and what is known of its own error."""
    logits, upstream = logits.double(), upstream.double()
    plan, residual, iterations = converge(logits / regularization)
    gradient = gradient_of_the_limit(plan, upstream, regularization)
    by_autograd = gradient_by_autograd(logits, upstream, regularization)
    return gradient, {
        "residual": residual,
        "iterations": iterations,
        "contraction": contraction(plan),
        "mass_off_largest": (1 - plan.max(1).values).max().item(),
        "autograd_differs_by": None if by_autograd is None else relative_error(by_autograd, gradient),
        "least_squares_differs_by": relative_error(gradient_by_least_squares(plan, upstream, regularization), gradient),
    }
