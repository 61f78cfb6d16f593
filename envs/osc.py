"""robosuite's operational-space controller as one compiled function, for each physics step."""

import math

import mujoco
import numba
import numpy as np


@numba.njit(cache=True)
def cholesky_solve(A, B):
    """Overwrites A (n, n), positive definite, with its Cholesky factor and B (n, m) with A^-1 B."""
    n, m = B.shape
    for j in range(n):
        for k in range(j):
            A[j, j] -= A[j, k] * A[j, k]
        A[j, j] = math.sqrt(A[j, j])
        for i in range(j + 1, n):
            for k in range(j):
                A[i, j] -= A[i, k] * A[j, k]
            A[i, j] /= A[j, j]
    for c in range(m):
        for i in range(n):
            for k in range(i):
                B[i, c] -= A[i, k] * B[k, c]
            B[i, c] /= A[i, i]
        for i in range(n - 1, -1, -1):
            for k in range(i + 1, n):
                B[i, c] -= A[k, i] * B[k, c]
            B[i, c] /= A[i, i]


@numba.njit(cache=True)
def torques(M, J, q, v, bias, pose, goal, gains, rest):
    """Joint torques (n,) that move the end effector towards its goal (Khatib 1987).

    It is robosuite's OSC_POSE, position uncoupled. M (n, n) mass matrix, J (6, n) Jacobian, q, v (n,)
    joint positions and velocities, bias (n,) gravity and Coriolis forces, pose and goal of the effector:
    position (3,), rotation (3, 3), gains kp and kd (6,), rest (n,) the posture of the null space.
    """
    n, (kp, kd) = len(q), gains
    (position, rotation), (target, turn) = pose, goal
    u = 10 * (rest - q) - 2 * math.sqrt(10.0) * v  # acceleration towards the rest posture
    force, drift, X, A = np.zeros((6, 1)), np.zeros((6, 1)), np.empty((n, 6)), np.zeros((6, 6))
    for i in range(6):
        twist = 0.0
        for j in range(n):
            twist += J[i, j] * v[j]
            drift[i, 0] += J[i, j] * u[j]
            X[j, i] = J[i, j]
        if i < 3:
            error = target[i] - position[i]
        else:  # half the sum of the cross products of the axes
            a, b, error = (i - 2) % 3, (i - 1) % 3, 0.0
            for c in range(3):
                error += 0.5 * (rotation[a, c] * turn[b, c] - rotation[b, c] * turn[a, c])
        force[i, 0] = kp[i] * error - kd[i] * twist
    cholesky_solve(M.copy(), X)  # M^-1 J^T
    for i in range(6):
        for j in range(6):
            for k in range(n):
                A[i, j] += J[i, k] * X[k, j]  # J M^-1 J^T
    cholesky_solve(A[:3, :3].copy(), force[:3])  # position and orientation each with their own inertia
    cholesky_solve(A[3:, 3:].copy(), force[3:])
    cholesky_solve(A, drift)
    return bias + (M * u).sum(1) + (J * (force - drift)).sum(0)


@numba.njit(cache=True)
def write_control(ctrl, mass, jacobian, qpos, qvel, bias, first, pose, goal, gains, rest, limits, hand):
    """Clipped torques of the arm whose n = len(rest) joints begin at `first` in qpos, qvel and ctrl."""
    n, (p, v, c) = len(rest), first
    M, J = mass[v : v + n, v : v + n].copy(), jacobian[:, v : v + n]
    tau = torques(M, J, qpos[p : p + n], qvel[v : v + n], bias[v : v + n], pose, goal, gains, rest)
    ctrl[c : c + n] = np.minimum(np.maximum(tau, limits[0]), limits[1])
    fingers, at, step, middle, half = hand  # `at`: where they are, in [-1, 1]
    at[:] = np.minimum(np.maximum(at + step, -1.0), 1.0)
    ctrl[fingers] = middle + half * at


class ArmControl:
    """Writes to data.ctrl what a robosuite arm and gripper would, after robosuite has set their goal."""

    def __init__(self, robot, action: np.ndarray):
        """`action` (7,): the arm's, of which the last is the gripper's."""
        model, data, controller = robot.sim.model._model, robot.sim.data._data, robot.controller
        self.model, self.data, self.site = model, data, model.site(controller.eef_name).id
        self.mass, jacobian = np.zeros((model.nv, model.nv)), np.zeros((6, model.nv))
        self.jacobian = jacobian[:3], jacobian[3:]
        indices = controller.qpos_index, controller.qvel_index, robot._ref_joint_actuator_indexes
        first = np.array([index[0] for index in indices])  # an arm's joints are numbered consecutively
        pose = data.site_xpos[self.site], data.site_xmat[self.site].reshape(3, 3)  # views of the state
        goal = np.array(controller.goal_pos), np.array(controller.goal_ori)
        gains, rest = (controller.kp, controller.kd), controller.initial_joint
        state = self.mass, jacobian, data.qpos, data.qvel, data.qfrc_bias
        gripper, limits = robot.gripper, tuple(robot.torque_limits)
        fingers = np.array([model.actuator(name).id for name in gripper.actuators])
        low, high = model.actuator_ctrlrange[fingers].T
        gripper.current_action = at = np.array(gripper.current_action)
        step = np.array([-1.0, 1.0]) * gripper.speed * np.sign(action[6])  # of robosuite's PandaGripper
        hand = fingers, at, step, 0.5 * (high + low), 0.5 * (high - low)
        self.control = data.ctrl, *state, first, pose, goal, gains, rest, limits, hand

    def __call__(self):
        mujoco.mj_jacSite(self.model, self.data, *self.jacobian, self.site)
        mujoco.mj_fullM(self.model, self.mass, self.data.qM)
        write_control(*self.control)
